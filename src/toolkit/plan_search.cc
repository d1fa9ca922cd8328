#include "toolkit/plan_search.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "core/status_macros.h"

namespace servoflow::toolkit {
namespace {

constexpr std::array<StepRisk, 6> kSteps = {{{8, 1}, {5, 3}, {4, 5}, {3, 7}, {2, 10}, {1, 15}}};
constexpr std::array<ReuseRisk, 3> kReuse = {{{2, 8}, {3, 16}, {4, 24}}};
constexpr std::array<Student, 8> kStudents = {{{12, 1, 40},
                                               {9, 1, 50},
                                               {18, 0.75, 50},
                                               {12, 0.75, 60},
                                               {6, 1, 70},
                                               {18, 0.5, 70},
                                               {9, 0.5, 80},
                                               {6, 0.5, 90}}};

int at_least(int x, int low) { return std::max(x, low); }

// Everything a plan may be changed to; the first of each is the plan as it is.
struct Levers {
  std::vector<std::pair<std::string, int>> precision;  // name, risk
  std::vector<std::pair<int, int>> steps, reuse;       // value, risk
  std::vector<std::optional<Student>> student;
};

Result<Levers> levers(const PlanCase& base, const UsedRates& rates) {
  SF_ASSIGN_OR_RETURN(const PlanPrecision have, plan_precision(base.precision));
  Levers out;
  out.precision.emplace_back(base.precision, 0);
  for (const PlanPrecision& p : plan_precisions())
    if (p.name != base.precision && p.risk >= have.risk && has_arithmetic(rates, p) &&
        (p.weight_bits < have.weight_bits || p.compute != std::string(have.compute)))
      out.precision.emplace_back(p.name, at_least(p.risk - have.risk, 0));
  out.steps.emplace_back(base.requests[0].steps, 0);
  for (const StepRisk& s : kSteps)
    if (s.steps < base.requests[0].steps) out.steps.emplace_back(s.steps, s.risk);
  out.reuse.emplace_back(base.reuse, 0);
  for (const ReuseRisk& r : kReuse)
    if (r.reuse > base.reuse) out.reuse.emplace_back(r.reuse, r.risk);
  out.student.emplace_back(std::nullopt);
  const weights::Architecture& a = base.architecture;
  for (const Student& s : kStudents)
    if (weights::check_architecture(student_of(a, s.layers, s.width)).empty() && s.layers <= a.prefix.depth)
      out.student.emplace_back(s);
  return out;
}

Result<TargetOption> option(const PlanCase& base, const DeviceProfile& device, const UsedRates& rates,
                            const std::pair<std::string, int>& precision, const std::pair<int, int>& steps,
                            const std::pair<int, int>& reuse, const std::optional<Student>& student) {
  TargetOption out{.plan = base};
  out.plan.precision = precision.first;
  for (WorkShape& r : out.plan.requests) r.steps = steps.first;
  out.plan.reuse = reuse.first;
  out.risk = precision.second + steps.second + reuse.second + (student ? student->risk : 0);
  if (precision.first != base.precision) out.changes.push_back("precision " + precision.first);
  if (steps.first != base.requests[0].steps)
    out.changes.push_back(fmt::format("{} denoise step{}", steps.first, steps.first == 1 ? "" : "s"));
  if (reuse.first != base.reuse)
    out.changes.push_back(fmt::format("a new prefix every {} inferences", reuse.first));
  if (student) {
    out.plan.architecture = student_of(base.architecture, student->layers, student->width);
    out.changes.push_back(
        fmt::format("a student of {} layers and {:g} of the width", student->layers, student->width));
  }
  SF_ASSIGN_OR_RETURN(out.prediction, predict(out.plan, device, rates));
  return out;
}

// `a` before `b`: reaches the target, then less risk, then faster.
bool better(const TargetOption& a, const TargetOption& b, double hz) {
  const bool reaches_a = a.prediction.hz >= hz, reaches_b = b.prediction.hz >= hz;
  if (reaches_a != reaches_b) return reaches_a;
  if (!reaches_a) return a.prediction.hz > b.prediction.hz;
  if (a.risk != b.risk) return a.risk < b.risk;
  return a.prediction.hz > b.prediction.hz;
}

}  // namespace

std::span<const StepRisk> step_risks() { return kSteps; }
std::span<const ReuseRisk> reuse_risks() { return kReuse; }
std::span<const Student> students() { return kStudents; }

weights::Architecture student_of(const weights::Architecture& base, int layers, double width) {
  weights::Architecture out = base;
  const auto scaled = [&](int size) {
    return width == 1 ? size : at_least(static_cast<int>(std::lround(size * width / 64)) * 64, 64);
  };
  for (weights::GemmaSizes* g : {&out.prefix, &out.expert}) {
    g->depth = std::min(layers, g->depth);
    g->width = scaled(g->width);
    g->mlp = scaled(g->mlp);
  }
  return out;
}

Result<TargetResult> find_target(const PlanCase& base, const DeviceProfile& device, const UsedRates& rates,
                                 double hz) {
  if (!(std::isfinite(hz) && hz > 0)) return Status::invalid("--target-hz must be a positive number");
  SF_ASSIGN_OR_RETURN(const Levers l, levers(base, rates));
  TargetResult out;
  out.hz = hz;
  std::optional<TargetOption> best;
  for (const auto& student : l.student)
    for (const auto& reuse : l.reuse)
      for (const auto& steps : l.steps)
        for (const auto& precision : l.precision) {
          SF_ASSIGN_OR_RETURN(TargetOption o, option(base, device, rates, precision, steps, reuse, student));
          if (!best || better(o, *best, hz)) best = std::move(o);
        }
  out.smallest = std::move(*best);
  out.reached = out.smallest.prediction.hz >= hz;

  // Each lever alone.
  const auto lone = [&](auto make, std::size_t count) -> Status {
    std::optional<TargetOption> found;
    for (std::size_t i = 1; i < count; ++i) {
      SF_ASSIGN_OR_RETURN(TargetOption o, make(i));
      if (!found || better(o, *found, hz)) found = std::move(o);
    }
    if (found) out.by_lever.push_back(std::move(*found));
    return {};
  };
  const auto make = [&](std::size_t p, std::size_t s, std::size_t r, std::size_t t) {
    return option(base, device, rates, l.precision[p], l.steps[s], l.reuse[r], l.student[t]);
  };
  SF_RETURN_IF_ERROR(lone([&](std::size_t i) { return make(i, 0, 0, 0); }, l.precision.size()));
  SF_RETURN_IF_ERROR(lone([&](std::size_t i) { return make(0, i, 0, 0); }, l.steps.size()));
  SF_RETURN_IF_ERROR(lone([&](std::size_t i) { return make(0, 0, i, 0); }, l.reuse.size()));
  SF_RETURN_IF_ERROR(lone([&](std::size_t i) { return make(0, 0, 0, i); }, l.student.size()));
  std::stable_sort(out.by_lever.begin(), out.by_lever.end(),
                   [](const TargetOption& a, const TargetOption& b) { return a.risk < b.risk; });
  return out;
}

}  // namespace servoflow::toolkit
