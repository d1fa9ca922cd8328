// The intermediate tensors of two runs of one case, kept and compared name by name.
#pragma once

#include <map>
#include <span>
#include <string>
#include <vector>

#include "core/shape.h"
#include "toolkit/case_runner.h"
#include "toolkit/compare.h"

namespace servoflow::toolkit {

// Rows of one tensor, thinned out alike on both sides.
struct Kept {
  std::vector<float> values;
  int rows = 0, cols = 0;
};

Kept thin(std::span<const float> values, const Shape& shape);

// A stage's group in the tolerances ("velocity", "k"); empty for a name no recorder writes.
std::string stage_group(const std::string& stage);

// Keeps what a run shows.
class KeepingTap : public CaseTap {
 public:
  explicit KeepingTap(bool layers) : layers_(layers) {}
  bool wants(std::string_view stage) const override {
    return !stage.starts_with("image/") && !stage.starts_with("time/") && stage != "t" &&
           stage != "prefix/embeddings";
  }
  void record(std::string_view stage, std::span<const float> values, const Shape& shape) override {
    keep(recorded_name(stage), -1, values, shape);
  }
  bool wants_inputs() const override { return layers_; }
  void input(std::string_view weights, int step, std::span<const float> rows, const Shape& shape) override {
    keep(std::string(weights), step, rows, shape);
  }

  struct One {
    std::string name;
    int step = -1;
    bool input = false;
    Kept kept;
  };
  std::vector<One> all;  // in the order of the pipeline

 private:
  void keep(const std::string& name, int step, std::span<const float> values, const Shape& shape) {
    const bool input = name.find(".weight") != std::string::npos;
    all.push_back({name, step, input, thin(values, shape)});
  }
  const bool layers_;
};

// Compares what A's and B's taps kept, case by case, into the report's tensors.
class Comparison {
 public:
  explicit Comparison(CompareReport& report) : report_(report) {}
  // Fails where the two show other tensors: they are not the same network.
  Status add(const KeepingTap& a, const KeepingTap& b, const std::string& case_name);
  // After the last case: growth over the tensor before, and channels that died.
  void finish();

 private:
  struct Alive {
    std::vector<bool> a, b;
  };
  void add(const KeepingTap::One& x, const Kept& y, const std::string& case_name);

  CompareReport& report_;
  std::map<std::string, std::size_t> index_;
  std::vector<Alive> alive_;
};

}  // namespace servoflow::toolkit
