// Rows in chunks of 16 bytes: one access where every row begins and ends on 16 bytes, else element by element.
#pragma once

#include "device.cuh"

namespace batchinfer {

// Elements `column` to column + kSize - 1 of a row of `size` elements. What lies past the end is 0, and is not read.
template <typename T, bool kAligned>
__device__ __forceinline__ Vector<T> load_chunk(const T* row, int column, int size) {
  if constexpr (kAligned) {
    if (column < size) return Vector<T>::load(row + column);
    return Vector<T>{};
  } else {
    Vector<T> v;
#pragma unroll
    for (int i = 0; i < Vector<T>::kSize; ++i) v.values[i] = column + i < size ? row[column + i] : from_float<T>(0.0f);
    return v;
  }
}

// Writes what `load_chunk` with the same arguments reads.
template <typename T, bool kAligned>
__device__ __forceinline__ void store_chunk(T* row, int column, int size, const Vector<T>& v) {
  if constexpr (kAligned) {
    if (column < size) v.store(row + column);
  } else {
#pragma unroll
    for (int i = 0; i < Vector<T>::kSize; ++i)
      if (column + i < size) row[column + i] = v.values[i];
  }
}

}  // namespace batchinfer
