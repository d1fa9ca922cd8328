// Moves tensors from a WeightSource to a backend: packed matrices and float32 vectors, with progress.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "ops/backend.h"
#include "servoflow/policy.h"
#include "weights/precision.h"
#include "weights/weight_source.h"

namespace servoflow::weights {

class Loader {
 public:
  Loader(ops::Backend& backend, const WeightSource& source, std::uint64_t total_parameters,
         ProgressFunction progress, Precision precision = {})
      : backend_(backend),
        source_(source),
        precision_(std::move(precision)),
        total_(total_parameters),
        progress_(std::move(progress)) {}

  // One packed matrix from the named tensors (rank 2 or more; all dimensions but the first are flattened):
  // quantized if the source stores them so or the precision rounds them.
  Result<ops::Weight> matrix(const std::vector<std::string>& names, const ops::PackOptions& options = {});
  // The named tensor for rows in bfloat16 parts (ops::PatchRows): [w | w] where bfloat16 holds its values,
  // else [w | w | what it left of w]. `parts` is how many there are.
  Result<ops::Weight> matrix_in_parts(const std::string& name, int& parts);
  // The named tensors behind each other as float32 in device memory. NaN and Inf are errors.
  Result<const float*> vector(const std::vector<std::string>& names);
  Result<const float*> vector(const std::string& name) { return vector(std::vector<std::string>{name}); }

  // The named tensor [rows, width], dense, in device memory: as bfloat16 if that holds its values, else as
  // float32.
  Result<ops::Matrix> table(const std::string& name);

  ops::Backend& backend() { return backend_; }
  std::uint64_t parameters() const { return parameters_; }
  std::uint64_t packed_bytes() const { return packed_; }
  // What the matrices loaded so far compute in, by part of the network.
  const std::vector<ComponentPrecision>& components() const { return components_; }

 private:
  Result<TensorData> from_source(const std::string& name) const;
  Result<ops::Weight> low_bit_matrix(const std::vector<std::string>& names, const ops::PackOptions& options);
  Result<std::optional<quant::LinearFormat>> low_bit_format(const std::vector<std::string>& names) const;
  void note(const std::string& name, const std::string& precision, const std::string& kernel,
            const ops::Weight& weight, int layers);
  void count(const TensorData& tensor, const std::string& name);

  ops::Backend& backend_;
  const WeightSource& source_;
  Precision precision_;
  std::vector<ComponentPrecision> components_;
  std::uint64_t total_, packed_ = 0, parameters_ = 0;
  ProgressFunction progress_;
};

}  // namespace servoflow::weights
