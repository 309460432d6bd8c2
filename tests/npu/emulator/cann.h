// The part of CANN's C interface that torch_npu calls and the emulator serves, declared by this project: names, argument
// types and numbers only, so that no vendor header is needed to build.
#pragma once
#include <cstddef>
#include <cstdint>

// ---- AscendCL: the runtime
typedef int aclError;
typedef void *aclrtStream, *aclrtEvent, *aclrtContext, *aclrtDrvMemHandle, *aclmdlRI;
typedef int aclrtMemMallocPolicy, aclrtMemcpyKind, aclrtMemAttr, aclrtFloatOverflowMode, aclSysParamOpt;
typedef int aclrtLastErrLevel, aclLogLevel, aclDeviceInfo, aclrtDevAttr, aclCannAttr, aclCANNPackageName;
typedef int aclmdlRICaptureStatus, aclmdlRICaptureMode, aclrtHostRegisterType, aclrtStreamAttr, aclrtStreamStatus;
typedef int aclrtEventRecordedStatus, aclrtEventWaitStatus, aclCompileOpt, aclrtCallbackBlockType;
typedef void (*aclrtCallback)(void*);
typedef void (*aclrtHostFunc)(void*);
struct aclrtMallocConfig;
struct aclrtPhysicalMemProp;
union aclrtStreamAttrValue;
struct aclrtPtrAttributes {
  struct {
    uint32_t id;
    int type;
  } location;
  uint32_t pageSize, reserved[4];
};
struct aclCANNPackageVersion {
  char version[128], parts[4][64], reserved[128];
};
struct aclrtUuid {
  char bytes[16];
};
struct aclrtUtilizationInfo {
  int32_t cube, vector, aicpu, memory;
  void* extension;
};
static_assert(sizeof(aclrtPtrAttributes) == 28 && sizeof(aclCANNPackageVersion) == 512);

enum {
  ACL_SUCCESS = 0,
  ACL_ERROR_INVALID_PARAM = 107000,
  ACL_ERROR_INVALID_DEVICE = 107001,
  ACL_ERROR_CONTEXT_NULL = 107002,
  ACL_ERROR_REPEAT_INITIALIZE = 100002,
  ACL_ERROR_FEATURE_UNSUPPORTED = 207000,
  ACL_ERROR_MEMORY_ALLOCATION = 207001,
  ACL_ERROR_KERNEL_FAILED = 500000,
};
enum {
  ACL_DEVICE_INFO_VECTOR_CORE_NUM = 1,
  ACL_CANN_ATTR_INF_NAN = 0,
  ACL_CANN_ATTR_BF16 = 1,
  ACL_CANN_ATTR_JIT_COMPILE = 2,
  ACL_PKG_NAME_DRIVER = 7,
  ACL_MODEL_RI_CAPTURE_STATUS_NONE = 0,
  ACL_STREAM_STATUS_COMPLETE = 0,
  ACL_EVENT_RECORDED_STATUS_COMPLETE = 1,
  ACL_EVENT_WAIT_STATUS_COMPLETE = 0,
  ACL_MEM_LOCATION_TYPE_HOST = 0,
  ACL_MEM_LOCATION_TYPE_DEVICE = 1,
  ACL_MEM_LOCATION_TYPE_UNREGISTERED = 2,
};
enum aclDataType : int {
  ACL_FLOAT = 0,
  ACL_FLOAT16 = 1,
  ACL_INT8 = 2,
  ACL_INT32 = 3,
  ACL_UINT8 = 4,
  ACL_INT16 = 6,
  ACL_INT64 = 9,
  ACL_DOUBLE = 11,
  ACL_BOOL = 12,
  ACL_COMPLEX64 = 16,
  ACL_COMPLEX128 = 17,
  ACL_BF16 = 27,
};
typedef int aclFormat;

// ---- HCCL: the collectives
enum HcclResult : int {
  HCCL_SUCCESS = 0,
  HCCL_E_PARA = 1,
  HCCL_E_MEMORY = 3,
  HCCL_E_SYSCALL = 8,
  HCCL_E_TIMEOUT = 9,
  HCCL_E_REMOTE = 21,
};
enum HcclDataType : int {
  HCCL_DATA_TYPE_INT8,
  HCCL_DATA_TYPE_INT16,
  HCCL_DATA_TYPE_INT32,
  HCCL_DATA_TYPE_FP16,
  HCCL_DATA_TYPE_FP32,
  HCCL_DATA_TYPE_INT64,
  HCCL_DATA_TYPE_UINT64,
  HCCL_DATA_TYPE_UINT8,
  HCCL_DATA_TYPE_UINT16,
  HCCL_DATA_TYPE_UINT32,
  HCCL_DATA_TYPE_FP64,
  HCCL_DATA_TYPE_BFP16,
  HCCL_DATA_TYPE_INT128,
};
enum HcclReduceOp : int { HCCL_REDUCE_SUM, HCCL_REDUCE_PROD, HCCL_REDUCE_MAX, HCCL_REDUCE_MIN };
enum { HCCL_SEND = 0, HCCL_RECV = 1, HCCL_COMM_CONFIG_RESERVED = 12 };
typedef void* HcclComm;
typedef int HcclConfig;
union HcclConfigValue {
  int32_t value;
};
struct HcclRootInfo {
  char internal[4108];
};
// Its layout grows with CANN's versions; only the name is read.
struct HcclCommConfig {
  char head[32];
  char hcclCommName[128];
  char rest[2240 - 160];
};
struct HcclSendRecvItem {
  int sendRecvType;
  void* buf;
  uint64_t count;
  HcclDataType dataType;
  uint32_t remoteRank;
};
static_assert(sizeof(HcclSendRecvItem) == 32);
