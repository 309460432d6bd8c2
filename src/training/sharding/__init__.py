"""Fully sharded data parallelism (FSDP2): --fsdp and --hsdp.

| file | what |
|---|---|
| `units` | splits a model into units and shards them |
| `shards` | the parts that a rank holds: optimizer, gradients and their norm |
| `part` | what the trainer and the state of a run call; an object that does nothing without --fsdp |
| `tensors` | splitting and gathering of single tensors |
| `in_step` | the same number of forward passes on all ranks during evaluation |
"""
