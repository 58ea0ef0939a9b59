#include "stream.h"
#include "guarded.h"

#include <c10/core/Event.h>
#include <c10/core/Stream.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <memory>
#include <optional>
#ifndef _WIN32
#include <dlfcn.h>
#endif

struct skep_stream {
  c10::Stream stream;
};
// None on the CPU, whose work is done when a call returns.
struct skep_event {
  std::optional<c10::Event> event;
};

char *skep_load_cuda(const char *path) {
#ifdef _WIN32
  return strdup("loading CUDA at run time is not supported on Windows");
#else
  return dlopen(path, RTLD_NOW | RTLD_GLOBAL) ? nullptr : strdup(dlerror());
#endif
}

char *skep_cuda_devices(bool *loaded, int *count) {
  return guarded([&] {
    *loaded = c10::impl::hasDeviceGuardImpl(c10::kCUDA);
    *count = *loaded ? c10::impl::VirtualGuardImpl(c10::kCUDA).deviceCount() : 0;
  });
}

char *skep_stream_new(int index, skep_stream **res) {
  return guarded([&] {
    if (index < 0) {
      *res = new skep_stream{c10::impl::VirtualGuardImpl(c10::kCPU).getStream(c10::Device(c10::kCPU))};
    } else {
      auto device = c10::Device(c10::kCUDA, static_cast<c10::DeviceIndex>(index));
      *res = new skep_stream{c10::impl::VirtualGuardImpl(c10::kCUDA).getStreamFromGlobalPool(device)};
    }
  });
}

void skep_stream_free(skep_stream *stream) { delete stream; }

char *skep_stream_enter(const skep_stream *stream, void **guard) {
  return guarded([&] { *guard = new c10::StreamGuard(stream->stream); });
}

void skep_stream_leave(void *guard) { delete static_cast<c10::StreamGuard *>(guard); }

char *skep_stream_uses(const skep_stream *stream, const skep_tensor *tensors, size_t n) {
  return guarded([&] {
    for (size_t i = 0; i < n; i++)
      if (!tensors[i]->is_cpu()) tensors[i]->record_stream(stream->stream);
  });
}

char *skep_event_record(const skep_stream *stream, skep_event **res) {
  return guarded([&] {
    auto event = std::make_unique<skep_event>();
    if (stream->stream.device_type() != c10::kCPU) {
      event->event.emplace(stream->stream.device_type(), c10::EventFlag::BACKEND_DEFAULT);
      event->event->record(stream->stream);
    }
    *res = event.release();
  });
}

void skep_event_free(skep_event *event) { delete event; }

char *skep_event_query(const skep_event *event, bool *reached) {
  return guarded([&] { *reached = !event->event || event->event->query(); });
}

char *skep_event_block(const skep_event *event, const skep_stream *stream) {
  return guarded([&] {
    if (event->event) event->event->block(stream->stream);
  });
}

char *skep_event_elapsed(const skep_event *from, const skep_event *to, double *millis) {
  return guarded([&] { *millis = from->event && to->event ? from->event->elapsedTime(*to->event) : 0.0; });
}
