// The linear layers of a network and what feeds them: which tensors read the same inputs, and where a
// multiplier of those inputs can be hidden without changing what the network computes.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "quant/methods/smoothing.h"
#include "quant/precision_plan.h"
#include "weights/architecture.h"
#include "weights/weight_source.h"

namespace servoflow::toolkit {

// Every tensor of the manifest that is the weight of a linear layer, without ".weight", in its order.
// Protected ones (quant::is_protected) included; token and position tables are none.
std::vector<quant::Linear> linear_layers(const weights::Architecture& architecture);

// What makes the inputs of a site.
enum class Producer {
  kRmsNorm,    // Gemma's: the weight w stands for 1 + w
  kAdaRms,     // the expert's: scale and shift come out of a dense layer on the time
  kLayerNorm,  // SigLIP's: weight and bias
  kLinear,     // rows of another layer: up for down (through the product with the gate), v for the output
               // projection
  kNone,  // nothing that a multiplier could be folded into (SigLIP's fc2 behind its GELU, the pictures, the
          // noise)
};

// Linear layers that read the same inputs.
struct Site {
  std::vector<std::string> linears;  // consumers
  int width = 0;                     // input channels, K
  Producer producer = Producer::kNone;
  std::string
      producer_name;  // its tensors are NAME.weight (and NAME.bias); kAdaRms: NAME.dense.weight, .bias
  bool producer_bias = false;
  quant::Tie tie;  // kLinear with shared heads: the producer's row of each channel; else empty
  // The expert's attention reads the prefix's values beside its own: a multiplier of either output
  // projection's inputs belongs into both value projections and both output projections of the layer. These
  // are the other network's.
  std::string other_producer, other_linear;
};
// In the order of the network, the prefix before the expert. Sites of projections that stay in high precision
// are not among them.
std::vector<Site> sites(const weights::Architecture& architecture);

// A checkpoint's tensors with changes that are made when a tensor is asked for: memory stays that of the
// tensors in use.
class EditedSource : public weights::WeightSource {
 public:
  EditedSource(std::shared_ptr<const weights::WeightSource> base) : base_(std::move(base)) {}

  // Multiplies the site's inputs (and those of other_linear) by m [width] where they are made and divides the
  // consumers' columns by it. Exact where all m are powers of two; else rounding to float32 remains. Fails
  // for a site that cannot hide it, for zero, negative or not finite multipliers, and for ones that differ
  // inside a tie.
  Status fold(const Site& site, std::span<const float> m);
  // Replaces a tensor's values, [elements].
  void replace(const std::string& name, std::vector<float> values) { replaced_[name] = std::move(values); }
  // Whether a tensor differs from the checkpoint's.
  bool edits(const std::string& name) const { return edits_.contains(name) || replaced_.contains(name); }

  // A tensor's values as they are now, whatever they are stored in; finite, or an error that names the
  // element.
  Result<std::vector<float>> values(const std::string& name) const;
  // The same before fold() and replace().
  Result<std::vector<float>> original(const std::string& name) const;
  // Divides values [rows, cols] of a layer's weight by what fold() multiplied it with: what they are worth in
  // the checkpoint's own units. Not for norms, whose weight w stands for 1 + w.
  void unfold(const std::string& name, std::span<float> values) const;

  bool has(const std::string& name) const override { return base_->has(name); }
  Result<weights::TensorData> get(const std::string& name) const override;
  void release(const std::string& name) const override { base_->release(name); }
  Status token_rows(std::span<const std::int32_t> ids, std::span<float> out) const override {
    return base_->token_rows(ids, out);
  }
  std::string stored_dtype() const override { return base_->stored_dtype(); }

 private:
  // value = (stored + offset[row]) · rows[row] · columns[col] - offset[row]; empty parts change nothing.
  struct Edit {
    std::vector<float> offset, rows, columns;
  };
  void multiply(std::vector<float>& into, std::span<const float> m);
  Result<std::vector<float>> read(const std::string& name, const Edit* edit) const;
  std::shared_ptr<const weights::WeightSource> base_;
  std::unordered_map<std::string, Edit> edits_;
  std::unordered_map<std::string, std::vector<float>> replaced_;
};

// Function-preserving outliers: in every site that `chosen` names ("up/down", "v/o" or both) each `stride`-th
// channel becomes 2^power as large, and its consumers' columns 2^-power. FP32 outputs stay to the bit,
// round-to-nearest of inputs does not survive it: what SmoothQuant, AWQ and clipping have to show.
struct OutlierOptions {
  bool up_down = true, v_o = true;
  int stride = 16, power = 6;
};
Status plant_outliers(const weights::Architecture& architecture, const OutlierOptions& options,
                      EditedSource& source);

}  // namespace servoflow::toolkit
