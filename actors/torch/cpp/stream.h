// Streams and events of a device through c10's device-generic interface: needs no CUDA to compile or to link, and
// reaches CUDA once libtorch_cuda is loaded. As in shim.h, every `char*` is null, or a message that the caller frees.
#pragma once
#include "shim.h"

extern "C" {
typedef struct skep_stream skep_stream;
typedef struct skep_event skep_event;

// Loads libtorch_cuda into a process that was linked without it. To be called before the first question about CUDA.
char *skep_load_cuda(const char *path);
// Whether libtorch_cuda is loaded, and how many devices it finds.
char *skep_cuda_devices(bool *loaded, int *count);

// A stream of a CUDA device, or the only one of the CPU for a negative index.
char *skep_stream_new(int index, skep_stream **res);
void skep_stream_free(skep_stream *stream);
// Makes it, and its device, the current one of this thread until the guard is left on the same thread.
char *skep_stream_enter(const skep_stream *stream, void **guard);
void skep_stream_leave(void *guard);
// Keeps the memory of tensors that another stream allocated until this one is done with what was given to it so far.
char *skep_stream_uses(const skep_stream *stream, const skep_tensor *tensors, size_t n);

// A mark behind all that was given to a stream. On the CPU it is always reached.
char *skep_event_record(const skep_stream *stream, skep_event **res);
void skep_event_free(skep_event *event);
// Whether the stream has come to it. Does not wait.
char *skep_event_query(const skep_event *event, bool *reached);
// The stream goes on behind the event. The calling thread does not wait.
char *skep_event_block(const skep_event *event, const skep_stream *stream);
// Milliseconds between two events that were reached; 0 on the CPU.
char *skep_event_elapsed(const skep_event *from, const skep_event *to, double *millis);
}
