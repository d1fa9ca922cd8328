#include "toolkit/bench_matrix.h"

#include <fmt/format.h>

#include <cmath>

#include "contract/json_fields.h"
#include "core/file.h"
#include "core/status_macros.h"
#include "toolkit/plan_toml.h"
#include "weights/architecture.h"

namespace servoflow::toolkit {
namespace {

using contract::JsonFields;
using contract::Problems;

constexpr int kVersion = 1;
constexpr const char* kKind = "servoflow bench matrix";
constexpr std::size_t kMaxArms = 1024;

// A list of integers in [low, high]; absent: `fallback` alone.
std::vector<int> integers(JsonFields& fields, const std::string& key, int low, int high, int fallback) {
  const Json* value = fields.get(key, false);
  if (value == nullptr) return {fallback};
  std::vector<int> out;
  if (!value->is_array() || value->empty()) {
    fields.problems().add(fields.field(key), "must be a list with at least one number, for example [1, 2]");
    return {fallback};
  }
  for (const Json& item : *value) {
    const bool whole = item.is_number_integer() && item.get<double>() >= low && item.get<double>() <= high;
    if (!whole) {
      fields.problems().add(
          fields.field(key) + "[" + std::to_string(out.size()) + "]",
          fmt::format("must be an integer between {} and {}, is {}", low, high, item.dump()));
      return {fallback};
    }
    out.push_back(item.get<int>());
  }
  return out;
}

template <typename T>
void refuse_repeats(const std::vector<T>& values, const std::string& key, Problems& problems) {
  for (std::size_t i = 0; i < values.size(); ++i)
    for (std::size_t k = i + 1; k < values.size(); ++k)
      if (values[i] == values[k]) problems.add(key, "holds a value twice");
}

Json arm_to_json(const MatrixArm& a) {
  return {{"precision", a.precision}, {"threads", a.threads},      {"views", a.work.views},
          {"tokens", a.work.tokens},  {"horizon", a.work.horizon}, {"steps", a.work.steps},
          {"batch", a.work.batch}};
}

MatrixArm arm_from(JsonFields& fields) {
  MatrixArm a;
  a.precision = fields.text("precision");
  a.threads = fields.integer("threads", 0, 4096);
  a.work.views = fields.integer("views", 0, 64);
  a.work.tokens = fields.integer("tokens", 1, weights::kMaxTokens);
  a.work.horizon = fields.integer("horizon", 1, weights::kMaxHorizon);
  a.work.steps = fields.integer("steps", 1, weights::kMaxSteps);
  a.work.batch = fields.integer("batch", 1, 64);
  return a;
}

// Positive milliseconds; stages of nothing (vision without pictures) may be 0.
std::vector<double> samples_of(JsonFields& fields, const std::string& key, bool positive) {
  std::vector<double> out = fields.numbers(key);
  for (const double x : out)
    if (positive ? !(x > 0) : !(x >= 0)) {
      fields.problems().add(fields.field(key), "holds a time that is not positive");
      break;
    }
  return out;
}

constexpr std::pair<const char*, std::vector<double> MatrixRound::*> kSeries[] = {
    {"end_to_end_ms", &MatrixRound::end_to_end}, {"preprocess_ms", &MatrixRound::preprocess},
    {"vision_ms", &MatrixRound::vision},         {"prefix_ms", &MatrixRound::prefix},
    {"denoise_ms", &MatrixRound::denoise},       {"postprocess_ms", &MatrixRound::postprocess},
    {"device_ms", &MatrixRound::device}};

Json summary_of(const ArmResult& a) {
  const Rounds rounds = a.end_to_end();
  Json out = Json::object();
  std::size_t count = 0;
  for (const auto& r : rounds) count += r.size();
  if (count == 0) return out;
  for (const auto& [name, share] : {std::pair("p50", 0.5), std::pair("p95", 0.95), std::pair("p99", 0.99)}) {
    const Interval i = bootstrap_quantile(rounds, share);
    out[name] = {{"ms", i.value}, {"low", i.low}, {"high", i.high}};
  }
  for (const auto& [name, series] : kSeries) {
    std::vector<double> all;
    for (const MatrixRound& r : a.rounds) all.insert(all.end(), (r.*series).begin(), (r.*series).end());
    if (!all.empty()) out["stages_p50"][name] = quantile(all, 0.5);
  }
  out["hz"] = 1000 / out["p50"]["ms"].get<double>();
  out["requests_per_second"] = a.arm.work.batch * out["hz"].get<double>();
  out["samples"] = count;
  return out;
}

}  // namespace

std::string arm_text(const MatrixArm& a) {
  const auto count = [](int n, const char* what) {
    return fmt::format("{} {}{}", n, what, n == 1 ? "" : "s");
  };
  return fmt::format("{}, {}, {}, {}, horizon {}, {}, batch {}", a.precision,
                     a.threads == 0 ? "all threads" : count(a.threads, "thread"), count(a.work.views, "view"),
                     count(a.work.tokens, "token"), a.work.horizon, count(a.work.steps, "step"),
                     a.work.batch);
}

Result<MatrixSpec> parse_matrix(std::string_view toml, const std::string& where) {
  SF_ASSIGN_OR_RETURN(const Json json, parse_toml(toml, where));
  Problems problems(where);
  JsonFields fields(json, "", problems);
  MatrixSpec out;
  out.model = fields.text("model", "");
  out.checkpoint = fields.text("checkpoint", "");
  out.robot = fields.text("robot", "");
  out.device = fields.text("device", "auto");
  if (out.model.empty() == out.checkpoint.empty())
    problems.add(
        "model",
        "give either model = \"pi05\" (or \"tiny\", or an architecture file) or checkpoint = \"DIR\"");
  std::vector<std::string> precisions = fields.texts("precision", false);
  if (precisions.empty()) precisions = {"auto"};
  const std::vector<int> threads = integers(fields, "threads", 0, 4096, 0),
                         views = integers(fields, "views", 0, 64, 2),
                         tokens = integers(fields, "tokens", 1, weights::kMaxTokens, 200),
                         horizons = integers(fields, "horizon", 1, weights::kMaxHorizon, 50),
                         steps = integers(fields, "steps", 1, weights::kMaxSteps, 10),
                         batches = integers(fields, "batch", 1, 64, 1);
  if (!out.checkpoint.empty() && json.contains("horizon"))
    problems.add("horizon", "a checkpoint has its own; only synthetic weights (model = ...) can have any");
  out.rounds = fields.integer("rounds", 1, 1000, 5);
  out.samples = fields.integer("samples", 1, 100000, 20);
  out.warmup_max = fields.integer("warmup_max", 1, 100000, 50);
  out.open = fields.integer("open", 1, 64, 1);
  fields.refuse_unknown();
  refuse_repeats(precisions, "precision", problems);
  for (const auto& [key, list] :
       {std::pair("threads", &threads), std::pair("views", &views), std::pair("tokens", &tokens),
        std::pair("horizon", &horizons), std::pair("steps", &steps), std::pair("batch", &batches)})
    refuse_repeats(*list, key, problems);
  double count = static_cast<double>(precisions.size());
  for (const auto* list : {&threads, &views, &tokens, &horizons, &steps, &batches})
    count *= static_cast<double>(list->size());
  if (count > static_cast<double>(kMaxArms))
    problems.add("", fmt::format("{:.0f} combinations; at most {} in one matrix", count, kMaxArms));
  SF_RETURN_IF_ERROR(problems.status());
  // Arms that share a policy stand together.
  for (const std::string& p : precisions)
    for (const int t : threads)
      for (const int h : horizons)
        for (const int b : batches)
          for (const int n : tokens)
            for (const int v : views)
              for (const int s : steps)
                out.arms.push_back({p, t, {.views = v, .tokens = n, .horizon = h, .steps = s, .batch = b}});
  return out;
}

Result<MatrixSpec> read_matrix(const std::string& path) {
  SF_ASSIGN_OR_RETURN(const std::string text, read_text_file(path, std::size_t{1} << 20));
  return parse_matrix(text, path);
}

Rounds ArmResult::end_to_end() const {
  Rounds out;
  for (const MatrixRound& r : rounds) out.push_back(r.end_to_end);
  return out;
}

bool MatrixResult::complete() const {
  for (const ArmResult& a : arms)
    if (static_cast<int>(a.rounds.size()) < rounds_wanted) return false;
  return true;
}

Json matrix_to_json(const MatrixResult& r, bool summary) {
  Json arms = Json::array();
  for (const ArmResult& a : r.arms) {
    Json rounds = Json::array();
    for (const MatrixRound& round : a.rounds) {
      Json one = Json::object();
      for (const auto& [name, series] : kSeries) one[name] = round.*series;
      rounds.push_back(std::move(one));
    }
    Json arm = arm_to_json(a.arm);
    arm["ran"] = {{"backend", a.backend}, {"precision", a.precision}, {"hardware", a.hardware}};
    arm["ready_s"] = a.ready_s;
    arm["device_bytes"] = a.device_bytes;
    arm["warmup_ms"] = a.warmup_ms;
    arm["steady"] = a.steady;
    arm["actions"] = a.actions;
    arm["same_actions"] = a.same_actions;
    if (summary) arm["summary"] = summary_of(a);
    arm["rounds"] = std::move(rounds);
    arms.push_back(std::move(arm));
  }
  return {{"kind", kKind},          {"version", kVersion},       {"matrix", r.matrix},
          {"protocol", r.protocol}, {"rounds", r.rounds_wanted}, {"complete", r.complete()},
          {"arms", std::move(arms)}};
}

Result<MatrixResult> matrix_from_json(const Json& json, const std::string& where) {
  Problems problems(where);
  JsonFields fields(json, "", problems);
  MatrixResult out;
  if (!fields.is_object()) return problems.status();
  if (json.value("kind", Json()) != Json(kKind))
    return Status::invalid(where + ": kind: not a result of `servoflow bench --matrix`");
  if (json.value("version", Json()) != Json(kVersion))
    return Status::invalid(fmt::format("{}: version: is {}, this build reads {}", where,
                                       json.value("version", Json()).dump(), kVersion));
  if (const Json* matrix = fields.get("matrix", true)) out.matrix = *matrix;
  if (const Json* protocol = fields.get("protocol", true)) out.protocol = *protocol;
  if (!out.matrix.is_object()) problems.add("matrix", "must be an object");
  if (!out.protocol.is_object()) problems.add("protocol", "must be an object");
  out.rounds_wanted = fields.integer("rounds", 1, 1000);
  for (const Json* item : fields.elements("arms")) {
    JsonFields f(*item, "arms[" + std::to_string(out.arms.size()) + "]", problems);
    if (!f.is_object()) continue;
    ArmResult a;
    a.arm = arm_from(f);
    static const Json kEmpty = Json::object();
    const Json* ran = f.get("ran", true);
    JsonFields r(ran != nullptr ? *ran : kEmpty, f.field("ran"), problems);
    a.backend = r.text("backend");
    a.precision = r.text("precision");
    a.hardware = r.text("hardware");
    if (const Json* x = f.get("ready_s", true); x != nullptr && x->is_number()) a.ready_s = x->get<double>();
    if (const Json* x = f.get("device_bytes", true); x != nullptr && x->is_number_unsigned())
      a.device_bytes = x->get<std::uint64_t>();
    a.warmup_ms = samples_of(f, "warmup_ms", true);
    a.steady = f.boolean("steady");
    a.actions = f.text("actions");
    a.same_actions = f.boolean("same_actions");
    for (const Json* round : f.elements("rounds")) {
      JsonFields series(*round, f.field("rounds") + "[" + std::to_string(a.rounds.size()) + "]", problems);
      MatrixRound one;
      if (series.is_object())
        for (const auto& [name, values] : kSeries)
          one.*values = samples_of(series, name, values == &MatrixRound::end_to_end);
      if (series.is_object() && one.end_to_end.empty())
        problems.add(series.field("end_to_end_ms"), "is empty");
      a.rounds.push_back(std::move(one));
    }
    if (static_cast<int>(a.rounds.size()) > out.rounds_wanted)
      problems.add(f.field("rounds"), "more than `rounds`");
    out.arms.push_back(std::move(a));
  }
  if (problems.empty() && out.arms.empty()) problems.add("arms", "is empty");
  SF_RETURN_IF_ERROR(problems.status());
  return out;
}

Result<MatrixResult> read_matrix_result(const std::string& path) {
  SF_ASSIGN_OR_RETURN(const Json json, read_json_file(path, std::size_t{256} << 20));
  return matrix_from_json(json, path);
}

}  // namespace servoflow::toolkit
