// The weights of a quantized checkpoint, layer by layer: smoothing first, for all sites, then each layer's
// scales and codes.
#pragma once

#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "toolkit/quantize.h"
#include "weights/checkpoint.h"

namespace servoflow::toolkit {

class LayerQuantizer {
 public:
  // Chooses and folds the multipliers of all sites. `statistics` may be null.
  static Result<std::unique_ptr<LayerQuantizer>> prepare(const weights::Checkpoint& checkpoint,
                                                         const QuantizeOptions& options,
                                                         const CalibrationStatistics* statistics,
                                                         std::map<std::string, quant::LinearFormat> formats);

  struct Layer {
    quant::QuantizedMatrix matrix;
    std::optional<std::vector<float>> bias;  // corrected
    LayerReport report;
  };
  // One of the layers that have a format. `has_bias`: its bias is read and may be corrected.
  Result<Layer> quantize(const quant::Linear& linear, bool has_bias) const;

  const EditedSource& source() const { return *source_; }

 private:
  struct SiteState {
    const Site* site = nullptr;
    const SiteStatistics* statistics = nullptr;
    std::vector<float> m;  // folded multiplier of the inputs; empty: none
    std::string method;
    std::optional<double> error, error_unsmoothed;  // what a search for multipliers minimised
  };
  LayerQuantizer(const QuantizeOptions& options) : options_(options) {}
  // Which layers' inputs are clipped, by options_.clip.
  Status choose_clipped(std::span<const quant::Linear> linears,
                        const std::map<std::string, SiteState>& states);
  // `other` is the prefix's output projection where `state` is the expert's of the same layer, else null.
  Status smooth(SiteState& state, SiteState* other);
  Result<std::vector<float>> shared_rows(const std::string& linear, int rows, std::int64_t cols) const;
  // Of the inputs as they are after folding, or as the checkpoint has them.
  std::vector<float> mean_square(const SiteState& state, bool folded = true) const;
  std::optional<quant::SecondMoment> moment(const SiteState& state) const;
  // The largest magnitude of the layers that share a global scale with this one, before or after folding.
  Result<std::optional<float>> shared_amax(const std::string& linear, bool folded) const;
  Status set_input_scale(const SiteState& state, const quant::LinearFormat& format,
                         quant::QuantizedMatrix& matrix, LayerReport& report) const;

  QuantizeOptions options_;
  std::map<std::string, quant::LinearFormat> formats_;
  std::vector<Site> sites_;
  std::map<std::string, SiteState> states_;  // by linear layer
  std::map<std::string, std::vector<std::string>>
      fused_;                      // layers that share a global scale, by each of them
  std::set<std::string> clipped_;  // by linear layer
  std::shared_ptr<EditedSource> source_;
};

}  // namespace servoflow::toolkit
