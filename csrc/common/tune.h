#pragma once
#include <stdlib.h>
namespace batchinfer {
inline int tune(const char* name, int otherwise) {
  const char* text = getenv(name);
  return text ? atoi(text) : otherwise;
}
}  // namespace batchinfer
