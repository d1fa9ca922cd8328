#include <dlfcn.h>
#include <library_types.h>

#include <cstdint>

#include "core/status_macros.h"
#include "ops/cuda/cublaslt.h"

namespace servoflow::ops::cuda {
namespace {

// The part of cublasLt.h (13.0) that is used here. Handles and descriptions are opaque; the numbers are the
// interface's and have not changed since cuBLASLt 11.
using Opaque = void*;
constexpr int kCompute32F = 68, kCompute32I = 72;
constexpr int kTransA = 3, kFastAccumulation = 25;  // of a product's description
constexpr int kMaxWorkspace = 1;                    // of a preference
constexpr int kTransposed = 1;                      // CUBLAS_OP_T
struct Algorithm {
  std::uint64_t data[8];
};
struct Heuristic {
  Algorithm algorithm;
  std::size_t workspace = 0;
  int state = 0;
  float waves = 0;
  int reserved[4];
};
static_assert(sizeof(Heuristic) == 96);

}  // namespace

struct Cublaslt::Functions {
  void* library = nullptr;
  Opaque handle = nullptr;
  int (*create)(Opaque*) = nullptr;
  int (*destroy)(Opaque) = nullptr;
  std::size_t (*version)() = nullptr;
  int (*product_create)(Opaque*, int, int) = nullptr;
  int (*product_destroy)(Opaque) = nullptr;
  int (*product_set)(Opaque, int, const void*, std::size_t) = nullptr;
  int (*layout_create)(Opaque*, int, std::uint64_t, std::uint64_t, std::int64_t) = nullptr;
  int (*layout_destroy)(Opaque) = nullptr;
  int (*preference_create)(Opaque*) = nullptr;
  int (*preference_destroy)(Opaque) = nullptr;
  int (*preference_set)(Opaque, int, const void*, std::size_t) = nullptr;
  int (*choose)(Opaque, Opaque, Opaque, Opaque, Opaque, Opaque, Opaque, int, Heuristic*, int*) = nullptr;
  int (*multiply)(Opaque, Opaque, const void*, const void*, Opaque, const void*, Opaque, const void*,
                  const void*, Opaque, void*, Opaque, const Algorithm*, void*, std::size_t,
                  cudaStream_t) = nullptr;

  ~Functions() {
    if (handle != nullptr) destroy(handle);
    if (library != nullptr) dlclose(library);
  }

  template <typename F>
  bool find(F& function, const char* name) {
    function = reinterpret_cast<F>(dlsym(library, name));
    return function != nullptr;
  }
  bool find_all() {
    return find(create, "cublasLtCreate") && find(destroy, "cublasLtDestroy") &&
           find(version, "cublasLtGetVersion") && find(product_create, "cublasLtMatmulDescCreate") &&
           find(product_destroy, "cublasLtMatmulDescDestroy") &&
           find(product_set, "cublasLtMatmulDescSetAttribute") &&
           find(layout_create, "cublasLtMatrixLayoutCreate") &&
           find(layout_destroy, "cublasLtMatrixLayoutDestroy") &&
           find(preference_create, "cublasLtMatmulPreferenceCreate") &&
           find(preference_destroy, "cublasLtMatmulPreferenceDestroy") &&
           find(preference_set, "cublasLtMatmulPreferenceSetAttribute") &&
           find(choose, "cublasLtMatmulAlgoGetHeuristic") && find(multiply, "cublasLtMatmul");
  }
};

namespace {

class LibraryProduct : public Cublaslt::Product {
 public:
  LibraryProduct(const Cublaslt::Functions& functions, bool integers, void* workspace, std::size_t bytes)
      : f_(functions), integers_(integers), workspace_(workspace), workspace_bytes_(bytes) {}
  ~LibraryProduct() override {
    for (Opaque layout : {w_, x_, y_})
      if (layout != nullptr) f_.layout_destroy(layout);
    if (product_ != nullptr) f_.product_destroy(product_);
  }

  // The library counts columns first: our row-major W [n, k] is its k x n, to be transposed.
  Status prepare(ProductKind kind, int m, int n, int k) {
    const bool fp8 = kind == ProductKind::kFp8;
    const int in = integers_ ? CUDA_R_8I : fp8 ? CUDA_R_8F_E4M3 : CUDA_R_16BF;
    const int out = integers_ ? CUDA_R_32I : CUDA_R_16BF;
    SF_RETURN_IF_ERROR(must(f_.product_create(&product_, integers_ ? kCompute32I : kCompute32F,
                                              integers_ ? CUDA_R_32I : CUDA_R_32F),
                            "description"));
    const std::int32_t transposed = kTransposed;
    SF_RETURN_IF_ERROR(
        must(f_.product_set(product_, kTransA, &transposed, sizeof(transposed)), "description"));
    if (const std::int8_t fast = 1; fp8)
      SF_RETURN_IF_ERROR(
          must(f_.product_set(product_, kFastAccumulation, &fast, sizeof(fast)), "description"));
    const auto rows = static_cast<std::uint64_t>(m), features = static_cast<std::uint64_t>(n),
               depth = static_cast<std::uint64_t>(k);
    SF_RETURN_IF_ERROR(must(f_.layout_create(&w_, in, depth, features, k), "layout"));
    SF_RETURN_IF_ERROR(must(f_.layout_create(&x_, in, depth, rows, k), "layout"));
    SF_RETURN_IF_ERROR(must(f_.layout_create(&y_, out, features, rows, n), "layout"));
    Opaque preference = nullptr;
    SF_RETURN_IF_ERROR(must(f_.preference_create(&preference), "preference"));
    int found = 0;
    const int set = f_.preference_set(preference, kMaxWorkspace, &workspace_bytes_, sizeof(workspace_bytes_));
    const int chosen =
        set != 0 ? set : f_.choose(handle(), product_, w_, x_, y_, y_, preference, 1, &best_, &found);
    f_.preference_destroy(preference);
    SF_RETURN_IF_ERROR(must(chosen, "choice of a kernel"));
    return found > 0 ? must(best_.state, "choice of a kernel")
                     : Status::runtime("cuBLASLt has no kernel for this product");
  }

  Status enqueue(const void* x, const void* w, void* y, cudaStream_t stream) override {
    const float one = 1, zero = 0;
    const std::int32_t integer_one = 1, integer_zero = 0;
    const void* alpha = integers_ ? static_cast<const void*>(&integer_one) : &one;
    const void* beta = integers_ ? static_cast<const void*>(&integer_zero) : &zero;
    return must(f_.multiply(handle(), product_, alpha, w, w_, x, x_, beta, y, y_, y, y_, &best_.algorithm,
                            workspace_, workspace_bytes_, stream),
                "product");
  }

 private:
  Opaque handle() const { return f_.handle; }
  static Status must(int status, const char* what) {
    return status == 0
               ? Status()
               : Status::runtime(std::string("cuBLASLt: ") + what + ": status " + std::to_string(status));
  }

  const Cublaslt::Functions& f_;
  bool integers_ = false;
  Opaque product_ = nullptr, w_ = nullptr, x_ = nullptr, y_ = nullptr;
  Heuristic best_{};
  void* workspace_ = nullptr;
  std::size_t workspace_bytes_ = 0;
};

}  // namespace

Cublaslt::~Cublaslt() = default;

Result<std::unique_ptr<Cublaslt>> Cublaslt::open(const std::string& path) {
  std::unique_ptr<Cublaslt> out(new Cublaslt);
  out->functions_ = std::make_unique<Functions>();
  Functions& f = *out->functions_;
  std::string why;
  for (const char* name : {path.c_str(), "libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"}) {
    if (*name == '\0' || (!path.empty() && name != path.c_str())) continue;
    f.library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (f.library != nullptr) break;
    if (const char* error = dlerror(); error != nullptr && why.empty()) why = error;
  }
  if (f.library == nullptr) return Status::runtime("cuBLASLt cannot be loaded: " + why);
  if (!f.find_all()) return Status::runtime("cuBLASLt: " + path + " has not its functions");
  if (const int status = f.create(&f.handle); status != 0)
    return Status::runtime("cuBLASLt: no handle: status " + std::to_string(status));
  // 130002 is 13.0.2; before cuBLAS 13, 120805 was 12.8.5.
  const std::size_t v = f.version();
  out->name_ = "cuBLASLt " + std::to_string(v / 10000) + "." + std::to_string(v % 10000 / 100) + "." +
               std::to_string(v % 100);
  return std::move(out);
}

Result<std::unique_ptr<Cublaslt::Product>> Cublaslt::prepare(ProductKind kind, int m, int n, int k,
                                                             void* workspace, std::size_t workspace_bytes) {
  auto product =
      std::make_unique<LibraryProduct>(*functions_, kind == ProductKind::kInt8, workspace, workspace_bytes);
  SF_RETURN_IF_ERROR(product->prepare(kind, m, n, k));
  return std::unique_ptr<Product>(std::move(product));
}

}  // namespace servoflow::ops::cuda
