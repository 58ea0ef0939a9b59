// Ends every C++ exception at the border to Rust.
#pragma once
#include <cstring>
#include <exception>

// Null, or a message that the caller frees with free().
template <class F> char *guarded(F &&body) {
  try {
    body();
    return nullptr;
  } catch (const std::exception &e) {
    return strdup(e.what());
  } catch (...) {
    return strdup("unknown C++ exception");
  }
}
