// cuBLASLt where it happens to be installed, as a yardstick: loaded when it is asked for, never needed.
#pragma once

#include <cuda_runtime.h>

#include <memory>
#include <string>

#include "ops/device_probe.h"

namespace servoflow::ops::cuda {

class Cublaslt {
 public:
  // By `path`, or by the names its packages use.
  static Result<std::unique_ptr<Cublaslt>> open(const std::string& path);
  ~Cublaslt();
  const std::string& name() const { return name_; }  // "cuBLASLt 13.0.2"

  // y[m, n] = x[m, k] · W[n, k]ᵀ, prepared once for many calls. The workspace stays the caller's.
  class Product {
   public:
    virtual ~Product() = default;
    virtual Status enqueue(const void* x, const void* w, void* y, cudaStream_t stream) = 0;
  };
  Result<std::unique_ptr<Product>> prepare(ProductKind kind, int m, int n, int k, void* workspace,
                                           std::size_t workspace_bytes);

  struct Functions;

 private:
  Cublaslt() = default;
  std::unique_ptr<Functions> functions_;
  std::string name_;
};

}  // namespace servoflow::ops::cuda
