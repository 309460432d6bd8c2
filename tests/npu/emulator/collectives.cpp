// libhccl.so of the emulated CANN: collectives between processes of one host, through files in a private folder.
//
// At each call every rank posts a file, a header and its payload, and reads the others'. The header lets each rank check
// that its peers made the same call; a mismatch is an error that names both calls. Calls are done when they return.
// A reducing call adds its sources in the order of the ranks, so that every rank gets the same bits.
//
// The folder goes when the last rank leaves; after a crash a watcher process removes it (see watchFolder).
//
//   CANN_EMULATOR_SHM      where the folders are (/dev/shm)
//   HCCL_EXEC_TIMEOUT      seconds until a peer that does not come is an error (1836)
//   CANN_EMULATOR_TRACE=1  prints every call
#include "cann.h"
#include "reduction.h"

#include <fcntl.h>
#include <spawn.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <filesystem>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <vector>

extern "C" int aclrtGetDevice(int32_t*);
extern char** environ;

namespace {

using std::to_string;

// ---- communicators

struct Communicator {
  std::string folder, name;
  uint32_t size, rank;
  std::mutex mutex;
  uint64_t calls = 0;                     // collectives made so far: the same number on every rank
  std::vector<pid_t> processes;           // by rank, once known
  std::map<uint32_t, uint64_t> sent, got;  // point to point, by peer
};
Communicator* communicator(HcclComm handle) { return static_cast<Communicator*>(handle); }
std::atomic<int> communicatorCount{0};

struct Header {
  char call[16];
  uint64_t count;
  int32_t type, operation, root;
  uint32_t rank;
};

std::string describe(const Header& header) {
  char text[160];
  snprintf(text, sizeof text, "%s(count %lu, dtype %d, op %d, root %d)", header.call,
           static_cast<unsigned long>(header.count), header.type, header.operation, header.root);
  return text;
}

HcclResult fail(HcclResult code, const Communicator* comm, const std::string& reason) {
  fprintf(stderr, "[emulated HCCL] %s, rank %u of %u: %s\n", comm->name.c_str(), comm->rank, comm->size, reason.c_str());
  return code;
}

// ---- messages: files that appear whole, by a rename

struct Part {
  const void* data;
  size_t size;
};

bool writeAll(int file, const void* data, size_t size) {
  auto* next = static_cast<const char*>(data);
  while (size) {
    const ssize_t written = write(file, next, size);
    if (written <= 0) return false;
    next += written;
    size -= written;
  }
  return true;
}

bool post(const std::string& path, const Header& header, const std::vector<Part>& parts) {
  const std::string unfinished = path + ".part";
  const int file = open(unfinished.c_str(), O_CREAT | O_WRONLY | O_TRUNC | O_CLOEXEC, 0600);
  if (file < 0) return false;
  bool whole = writeAll(file, &header, sizeof header);
  for (const Part& part : parts) whole = whole && writeAll(file, part.data, part.size);
  close(file);
  return whole && rename(unfinished.c_str(), path.c_str()) == 0;
}

// A peer's message, mapped.
class Message {
 public:
  Message() = default;
  Message(const Message&) = delete;
  Message(Message&& other) noexcept : memory_(other.memory_), size_(other.size_) { other.memory_ = nullptr; }
  ~Message() {
    if (memory_) munmap(memory_, size_);
  }
  bool open(const std::string& path) {
    const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (file < 0) return false;
    struct stat status;
    fstat(file, &status);
    size_ = status.st_size;
    void* mapped = mmap(nullptr, size_, PROT_READ, MAP_SHARED, file, 0);
    close(file);
    if (mapped == MAP_FAILED) return false;
    memory_ = mapped;
    return true;
  }
  const Header& header() const { return *static_cast<const Header*>(memory_); }
  const char* data() const { return static_cast<const char*>(memory_) + sizeof(Header); }

 private:
  void* memory_ = nullptr;
  size_t size_ = 0;
};

double now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec + time.tv_nsec * 1e-9;
}

double patience() {
  static const double seconds = [] {
    const char* value = getenv("HCCL_EXEC_TIMEOUT");
    return value && *value ? atof(value) : 1836.0;
  }();
  return seconds;
}

// A process that has ended and that nobody has waited for yet (a zombie) is gone, too.
bool isAlive(pid_t process) {
  if (kill(process, 0) && errno == ESRCH) return false;
  FILE* status = fopen(("/proc/" + to_string(process) + "/stat").c_str(), "re");
  if (!status) return false;
  char state = 'Z';
  const int fields = fscanf(status, "%*d (%*[^)]) %c", &state);
  fclose(status);
  return fields == 1 && state != 'Z';
}

HcclResult await(const Communicator* comm, const std::string& path, uint32_t peer, Message& message) {
  const double start = now();
  double nextLook = start + 0.2;
  for (int tries = 0; !message.open(path); tries++) {
    if (now() > nextLook) {
      nextLook = now() + 0.2;
      const pid_t process = peer < comm->processes.size() ? comm->processes[peer] : 0;
      if (process && !isAlive(process))
        return fail(HCCL_E_REMOTE, comm, "peer " + to_string(peer) + " is gone");
      if (now() - start > patience())
        return fail(HCCL_E_TIMEOUT, comm, "no word from peer " + to_string(peer) + " (" + path + ")");
    }
    usleep(tries < 20 ? 20 : tries < 2000 ? 100 : 1000);
  }
  return HCCL_SUCCESS;
}

// One collective: posts this rank's parts and hands each rank's payload to `use`, in the order of the ranks.
// `count` must agree between ranks unless it is kAnyCount.
constexpr uint64_t kAnyCount = ~0ull;
HcclResult exchange(Communicator* comm, const char* call, uint64_t count, HcclDataType type, int operation, int root,
                    const std::vector<Part>& mine, const std::function<void(uint32_t, const char*)>& use) {
  std::lock_guard<std::mutex> guard(comm->mutex);
  Header header{};
  snprintf(header.call, sizeof header.call, "%s", call);
  header.count = count;
  header.type = type;
  header.operation = operation;
  header.root = root;
  header.rank = comm->rank;
  if (getenv("CANN_EMULATOR_TRACE"))
    fprintf(stderr, "[emulated HCCL] %s, rank %u, call %lu: %s\n", comm->name.c_str(), comm->rank,
            static_cast<unsigned long>(comm->calls), describe(header).c_str());
  const auto path = [&](uint32_t rank, uint64_t number) {
    return comm->folder + "/call" + to_string(number) + "." + to_string(rank);
  };
  if (!post(path(comm->rank, comm->calls), header, mine))
    return fail(HCCL_E_SYSCALL, comm, "cannot write " + path(comm->rank, comm->calls));
  std::vector<Message> messages(comm->size);
  const uint64_t number = comm->calls++;  // also where the calls do not match: the ranks stay in step
  for (uint32_t rank = 0; rank < comm->size; rank++) {
    if (const auto error = await(comm, path(rank, number), rank, messages[rank])) return error;
    const Header& other = messages[rank].header();
    if (strcmp(other.call, header.call) || other.count != header.count || other.type != header.type ||
        other.operation != header.operation || other.root != header.root)
      return fail(HCCL_E_PARA, comm,
                  "calls do not match: I made " + describe(header) + ", rank " + to_string(rank) + " made " + describe(other));
  }
  for (uint32_t rank = 0; rank < comm->size; rank++) use(rank, messages[rank].data());
  // Who has posted this call has read the one before it, and all have posted this call: the one before may go.
  if (number >= 1) unlink(path(comm->rank, number - 1).c_str());
  return HCCL_SUCCESS;
}

// ---- folders

// Removes `folder` once no process that has left its pid there lives: also after a SIGKILL of all of them. A shell does
// it, since a copy of this process with its threads may do next to nothing.
void watchFolder(const std::string& folder) {
  static const char script[] =
      "while [ -d \"$0\" ]; do alive=; for f in \"$0\"/pid.*; do kill -0 \"${f##*.}\" 2>/dev/null && alive=1; done; "
      "[ \"$alive\" ] || rm -rf \"$0\"; sleep 0.3; done";
  const char* arguments[] = {"sh", "-c", script, folder.c_str(), nullptr};
  posix_spawn_file_actions_t files;
  posix_spawn_file_actions_init(&files);
  // Who waits for the end of our output must not wait for the watcher.
  for (int descriptor = 0; descriptor < 3; descriptor++)
    posix_spawn_file_actions_addopen(&files, descriptor, "/dev/null", O_RDWR, 0);
  posix_spawnattr_t attributes;
  posix_spawnattr_init(&attributes);
  posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSID);  // a kill of our process group does not reach it
  pid_t watcher;
  posix_spawn(&watcher, "/bin/sh", &files, &attributes, const_cast<char* const*>(arguments), environ);
  posix_spawnattr_destroy(&attributes);
  posix_spawn_file_actions_destroy(&files);
}

void leaveMark(const std::string& path) {
  const int file = open(path.c_str(), O_CREAT | O_WRONLY | O_CLOEXEC, 0600);
  if (file >= 0) close(file);
}

HcclResult join(const std::string& folder, uint32_t size, uint32_t rank, const char* name, HcclComm* handle) {
  auto* comm = new Communicator;
  comm->folder = folder;
  comm->size = size;
  comm->rank = rank;
  comm->name = name && *name ? name : "communicator" + to_string(communicatorCount++);
  comm->processes.resize(size);
  mkdir(folder.c_str(), 0700);
  leaveMark(folder + "/pid." + to_string(getpid()));
  *handle = comm;

  struct {
    int32_t process, device;
  } me{getpid(), -1};
  aclrtGetDevice(&me.device);
  HcclResult clash = HCCL_SUCCESS;
  std::map<int32_t, uint32_t> rankOfDevice;
  const auto error = exchange(comm, "init", size, HCCL_DATA_TYPE_INT32, 0, 0, {{&me, sizeof me}}, [&](uint32_t peer, const char* data) {
    int32_t process, device;
    memcpy(&process, data, sizeof process);
    memcpy(&device, data + sizeof process, sizeof device);
    comm->processes[peer] = process;
    const auto [other, isNew] = rankOfDevice.emplace(device, peer);
    if (!isNew)
      clash = fail(HCCL_E_PARA, comm, "ranks " + to_string(other->second) + " and " + to_string(peer) + " both use device " + to_string(device));
  });
  return error ? error : clash;
}

}  // namespace

extern "C" {

// ---- life of a communicator
HcclResult HcclGetRootInfo(HcclRootInfo* info) {
  const char* parent = getenv("CANN_EMULATOR_SHM");
  std::string folder = std::string(parent && *parent ? parent : "/dev/shm") + "/emulated_hccl.XXXXXX";
  memset(info, 0, sizeof *info);
  if (!mkdtemp(folder.data())) return HCCL_E_SYSCALL;
  leaveMark(folder + "/pid." + to_string(getpid()));
  watchFolder(folder);
  strcpy(info->internal, folder.c_str());
  return HCCL_SUCCESS;
}
HcclResult HcclCommInitRootInfoConfig(uint32_t size, const HcclRootInfo* info, uint32_t rank, const HcclCommConfig* config,
                                      HcclComm* handle) {
  return join(info->internal, size, rank, config ? config->hcclCommName : "", handle);
}
HcclResult HcclCommInitRootInfo(uint32_t size, const HcclRootInfo* info, uint32_t rank, HcclComm* handle) {
  return join(info->internal, size, rank, "", handle);
}
HcclResult HcclCreateSubCommConfig(HcclComm* parent, uint32_t size, uint32_t*, uint64_t id, uint32_t rank,
                                   HcclCommConfig* config, HcclComm* handle) {
  const std::string folder = communicator(*parent)->folder + "/sub" + to_string(id);
  return join(folder, size, rank, config ? config->hcclCommName : "", handle);
}
HcclResult HcclCommDestroy(HcclComm handle) {
  // A slower peer may still read what this rank posted last: the last one to leave removes the folder.
  Communicator* comm = communicator(handle);
  leaveMark(comm->folder + "/left." + to_string(comm->rank));
  bool last = true;
  for (uint32_t rank = 0; rank < comm->size; rank++)
    last = last && access((comm->folder + "/left." + to_string(rank)).c_str(), F_OK) == 0;
  std::error_code ignored;
  if (last) std::filesystem::remove_all(comm->folder, ignored);
  delete comm;
  return HCCL_SUCCESS;
}
HcclResult HcclGetCommName(HcclComm comm, char* name) {
  snprintf(name, 128, "%s", communicator(comm)->name.c_str());
  return HCCL_SUCCESS;
}
HcclResult HcclGetRankSize(HcclComm comm, uint32_t* size) {
  *size = communicator(comm)->size;
  return HCCL_SUCCESS;
}
HcclResult HcclGetRankId(HcclComm comm, uint32_t* rank) {
  *rank = communicator(comm)->rank;
  return HCCL_SUCCESS;
}
HcclResult HcclGetCommAsyncError(HcclComm, HcclResult* error) {
  *error = HCCL_SUCCESS;
  return HCCL_SUCCESS;
}
uint32_t HcclGetCommConfigCapability() { return HCCL_COMM_CONFIG_RESERVED; }
HcclResult HcclCommInitAll(uint32_t, int32_t*, HcclComm*) { return HCCL_E_PARA; }  // one process, many devices
HcclResult HcclSetConfig(HcclConfig, HcclConfigValue) { return HCCL_SUCCESS; }
HcclResult HcclGetConfig(HcclConfig, HcclConfigValue* value) {
  value->value = 0;
  return HCCL_SUCCESS;
}
const char* HcclGetErrorString(HcclResult) { return "the emulated HCCL said why on stderr"; }
HcclResult HcclCommResume(HcclComm) { return HCCL_SUCCESS; }
HcclResult HcclCommSuspend(HcclComm) { return HCCL_SUCCESS; }

// ---- collectives
HcclResult HcclAllReduce(void* source, void* target, uint64_t count, HcclDataType type, HcclReduceOp operation,
                         HcclComm handle, aclrtStream) {
  Reducer reducer(type, operation, count);
  const auto error = exchange(communicator(handle), "allreduce", count, type, operation, 0, {{source, count * width(type)}},
                              [&](uint32_t, const char* data) { reducer.add(data); });
  if (!error) reducer.store(target);
  return error;
}
HcclResult HcclReduce(void* source, void* target, uint64_t count, HcclDataType type, HcclReduceOp operation, uint32_t root,
                      HcclComm handle, aclrtStream) {
  const bool isRoot = communicator(handle)->rank == root;
  Reducer reducer(type, operation, count);
  const auto error = exchange(communicator(handle), "reduce", count, type, operation, root, {{source, count * width(type)}},
                              [&](uint32_t, const char* data) { if (isRoot) reducer.add(data); });
  if (!error && isRoot) reducer.store(target);
  return error;
}
HcclResult HcclReduceScatter(void* source, void* target, uint64_t count, HcclDataType type, HcclReduceOp operation,
                             HcclComm handle, aclrtStream) {
  Communicator* comm = communicator(handle);
  const size_t bytes = count * width(type);
  Reducer reducer(type, operation, count);
  const auto error = exchange(comm, "reduce_scatter", count, type, operation, 0, {{source, bytes * comm->size}},
                              [&](uint32_t, const char* data) { reducer.add(data + comm->rank * bytes); });
  if (!error) reducer.store(target);
  return error;
}
HcclResult HcclReduceScatterV(void* source, const void* counts, const void* offsets, void* target, uint64_t count,
                              HcclDataType type, HcclReduceOp operation, HcclComm handle, aclrtStream) {
  Communicator* comm = communicator(handle);
  auto *sizes = static_cast<const uint64_t*>(counts), *starts = static_cast<const uint64_t*>(offsets);
  size_t total = 0;
  for (uint32_t rank = 0; rank < comm->size; rank++) total = std::max<size_t>(total, starts[rank] + sizes[rank]);
  Reducer reducer(type, operation, count);
  const auto error =
      exchange(comm, "reduce_scatter_v", total, type, operation, 0, {{source, total * width(type)}},
               [&](uint32_t, const char* data) { reducer.add(data + starts[comm->rank] * width(type)); });
  if (!error) reducer.store(target);
  return error;
}
HcclResult HcclBroadcast(void* buffer, uint64_t count, HcclDataType type, uint32_t root, HcclComm handle, aclrtStream) {
  Communicator* comm = communicator(handle);
  const size_t bytes = count * width(type);
  std::vector<Part> mine;
  if (comm->rank == root) mine.push_back({buffer, bytes});
  return exchange(comm, "broadcast", count, type, 0, root, mine, [&](uint32_t rank, const char* data) {
    if (rank == root && comm->rank != root) memcpy(buffer, data, bytes);
  });
}
HcclResult HcclAllGather(void* source, void* target, uint64_t count, HcclDataType type, HcclComm handle, aclrtStream) {
  const size_t bytes = count * width(type);
  return exchange(communicator(handle), "allgather", count, type, 0, 0, {{source, bytes}},
                  [&](uint32_t rank, const char* data) { memcpy(static_cast<char*>(target) + rank * bytes, data, bytes); });
}
HcclResult HcclAllGatherV(void* source, uint64_t count, void* target, const void* counts, const void* offsets,
                          HcclDataType type, HcclComm handle, aclrtStream) {
  auto *sizes = static_cast<const uint64_t*>(counts), *starts = static_cast<const uint64_t*>(offsets);
  return exchange(communicator(handle), "allgather_v", kAnyCount, type, 0, 0, {{source, count * width(type)}},
                  [&](uint32_t rank, const char* data) {
                    memcpy(static_cast<char*>(target) + starts[rank] * width(type), data, sizes[rank] * width(type));
                  });
}
HcclResult HcclScatter(void* source, void* target, uint64_t count, HcclDataType type, uint32_t root, HcclComm handle,
                       aclrtStream) {
  Communicator* comm = communicator(handle);
  const size_t bytes = count * width(type);
  std::vector<Part> mine;
  if (comm->rank == root) mine.push_back({source, bytes * comm->size});
  return exchange(comm, "scatter", count, type, 0, root, mine, [&](uint32_t rank, const char* data) {
    if (rank == root) memcpy(target, data + comm->rank * bytes, bytes);
  });
}
HcclResult HcclAlltoAll(const void* source, uint64_t count, HcclDataType type, const void* target, uint64_t, HcclDataType,
                        HcclComm handle, aclrtStream) {
  Communicator* comm = communicator(handle);
  const size_t bytes = count * width(type);
  auto* out = static_cast<char*>(const_cast<void*>(target));  // the interface says const and means the output
  return exchange(comm, "alltoall", count, type, 0, 0, {{source, bytes * comm->size}},
                  [&](uint32_t rank, const char* data) { memcpy(out + rank * bytes, data + comm->rank * bytes, bytes); });
}
HcclResult HcclAlltoAllV(const void* source, const void* sendCounts, const void* sendOffsets, HcclDataType type,
                         const void* target, const void* receiveCounts, const void* receiveOffsets, HcclDataType,
                         HcclComm handle, aclrtStream) {
  Communicator* comm = communicator(handle);
  auto *counts = static_cast<const uint64_t*>(sendCounts), *starts = static_cast<const uint64_t*>(sendOffsets);
  auto *wanted = static_cast<const uint64_t*>(receiveCounts), *places = static_cast<const uint64_t*>(receiveOffsets);
  const size_t element = width(type);
  // The payload: size + 1 offsets in bytes, then the pieces for rank 0, 1, ...
  std::vector<uint64_t> ends(comm->size + 1, 0);
  for (uint32_t rank = 0; rank < comm->size; rank++) ends[rank + 1] = ends[rank] + counts[rank] * element;
  const size_t tableBytes = ends.size() * sizeof ends[0];
  std::vector<Part> mine{{ends.data(), tableBytes}};
  for (uint32_t rank = 0; rank < comm->size; rank++)
    mine.push_back({static_cast<const char*>(source) + starts[rank] * element, counts[rank] * element});
  auto* out = static_cast<char*>(const_cast<void*>(target));
  HcclResult mismatch = HCCL_SUCCESS;
  const auto error = exchange(comm, "alltoallv", kAnyCount, type, 0, 0, mine, [&](uint32_t rank, const char* data) {
    auto* table = reinterpret_cast<const uint64_t*>(data);
    const size_t bytes = table[comm->rank + 1] - table[comm->rank];
    if (bytes != wanted[rank] * element)
      mismatch = fail(HCCL_E_PARA, comm, "alltoallv: rank " + to_string(rank) + " sends " + to_string(bytes) +
                                             " bytes, I expect " + to_string(wanted[rank] * element));
    else
      memcpy(out + places[rank] * element, data + tableBytes + table[comm->rank], bytes);
  });
  return error ? error : mismatch;
}
HcclResult HcclBarrier(HcclComm handle, aclrtStream) {
  return exchange(communicator(handle), "barrier", 0, HCCL_DATA_TYPE_INT8, 0, 0, {}, [](uint32_t, const char*) {});
}

// ---- point to point: what is sent is buffered without limit, so that a send never waits
HcclResult HcclSend(void* source, uint64_t count, HcclDataType type, uint32_t to, HcclComm handle, aclrtStream) {
  Communicator* comm = communicator(handle);
  Header header{};
  strcpy(header.call, "send");
  header.count = count;
  header.type = type;
  header.rank = comm->rank;
  uint64_t number;
  {
    std::lock_guard<std::mutex> guard(comm->mutex);
    number = comm->sent[to]++;
  }
  const std::string path = comm->folder + "/from" + to_string(comm->rank) + "to" + to_string(to) + "." + to_string(number);
  if (post(path, header, {{source, count * width(type)}})) return HCCL_SUCCESS;
  return fail(HCCL_E_SYSCALL, comm, "cannot write " + path);
}
HcclResult HcclRecv(void* target, uint64_t count, HcclDataType type, uint32_t from, HcclComm handle, aclrtStream) {
  Communicator* comm = communicator(handle);
  uint64_t number;
  {
    std::lock_guard<std::mutex> guard(comm->mutex);
    number = comm->got[from]++;
  }
  const std::string path = comm->folder + "/from" + to_string(from) + "to" + to_string(comm->rank) + "." + to_string(number);
  Message message;
  if (const auto error = await(comm, path, from, message)) return error;
  if (message.header().count != count || message.header().type != type)
    return fail(HCCL_E_PARA, comm, "recv of " + to_string(count) + " elements of dtype " + to_string(type) + " meets " + describe(message.header()));
  memcpy(target, message.data(), count * width(type));
  unlink(path.c_str());
  return HCCL_SUCCESS;
}
HcclResult HcclBatchSendRecv(HcclSendRecvItem* items, uint32_t length, HcclComm comm, aclrtStream stream) {
  for (auto* item = items; item < items + length; item++)
    if (item->sendRecvType == HCCL_SEND)
      if (const auto error = HcclSend(item->buf, item->count, item->dataType, item->remoteRank, comm, stream)) return error;
  for (auto* item = items; item < items + length; item++)
    if (item->sendRecvType == HCCL_RECV)
      if (const auto error = HcclRecv(item->buf, item->count, item->dataType, item->remoteRank, comm, stream)) return error;
  return HCCL_SUCCESS;
}

}  // extern "C"
