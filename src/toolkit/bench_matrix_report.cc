#include "toolkit/bench_matrix_report.h"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>

#include "core/file.h"
#include "core/status_macros.h"
#include "toolkit/plan_report.h"
#include "toolkit/writers.h"

namespace servoflow::toolkit {
namespace {

std::string ms(double x) { return fmt::format("{:.4g}", x); }
std::string range(const Interval& i) { return fmt::format("{:.4g} - {:.4g}", i.low, i.high); }

std::vector<double> stage(const ArmResult& a, std::vector<double> MatrixRound::*series) {
  std::vector<double> out;
  for (const MatrixRound& r : a.rounds) out.insert(out.end(), (r.*series).begin(), (r.*series).end());
  return out;
}

// What differs among the arms, so that tables and figures name that and not everything.
std::string short_name(const MatrixArm& a, const std::vector<ArmResult>& all) {
  std::string out;
  const auto add = [&](auto get, const std::string& text) {
    if (std::any_of(all.begin(), all.end(), [&](const ArmResult& other) { return get(other.arm) != get(a); }))
      out += (out.empty() ? "" : ", ") + text;
  };
  add([](const MatrixArm& x) { return x.precision; }, a.precision);
  add([](const MatrixArm& x) { return x.threads; },
      fmt::format("{} threads", a.threads == 0 ? "all" : std::to_string(a.threads)));
  add([](const MatrixArm& x) { return x.work.views; }, fmt::format("{} views", a.work.views));
  add([](const MatrixArm& x) { return x.work.tokens; }, fmt::format("{} tokens", a.work.tokens));
  add([](const MatrixArm& x) { return x.work.horizon; }, fmt::format("horizon {}", a.work.horizon));
  add([](const MatrixArm& x) { return x.work.steps; }, fmt::format("{} steps", a.work.steps));
  add([](const MatrixArm& x) { return x.work.batch; }, fmt::format("batch {}", a.work.batch));
  return out.empty() ? arm_text(a) : out;
}

HtmlTable summary_table(const MatrixResult& r) {
  HtmlTable out{.caption = "End to end, ms, with 95 % intervals",
                .header = {"arm", "p50", "interval", "p95", "interval", "p99", "interval", "Hz",
                           "requests / s", "vision", "prefix", "denoise", "samples", "warm-up"}};
  for (const ArmResult& a : r.arms) {
    const Rounds rounds = a.end_to_end();
    const std::size_t count = stage(a, &MatrixRound::end_to_end).size();
    if (count == 0) continue;
    const Interval p50 = bootstrap_quantile(rounds, 0.5), p95 = bootstrap_quantile(rounds, 0.95),
                   p99 = bootstrap_quantile(rounds, 0.99);
    out.rows.push_back({short_name(a.arm, r.arms), ms(p50.value), range(p50), ms(p95.value), range(p95),
                        ms(p99.value), range(p99), fmt::format("{:.3g}", 1000 / p50.value),
                        fmt::format("{:.3g}", 1000 / p50.value * a.arm.work.batch),
                        ms(quantile(stage(a, &MatrixRound::vision), 0.5)),
                        ms(quantile(stage(a, &MatrixRound::prefix), 0.5)),
                        ms(quantile(stage(a, &MatrixRound::denoise), 0.5)), std::to_string(count),
                        fmt::format("{}{}", a.warmup_ms.size(), a.steady ? "" : " (not steady)")});
  }
  return out;
}

HtmlTable comparison_table(const MatrixComparison& c) {
  HtmlTable out{.caption = fmt::format("Against {}: ratio of median times, {:.2f} % intervals", c.before,
                                       100 * c.level),
                .header = {"arm", "before, ms", "now, ms", "now / before", "interval", "verdict"}};
  for (const ArmComparison& a : c.arms)
    out.rows.push_back({arm_text(a.arm), ms(a.before_ms), ms(a.now_ms), fmt::format("{:.4f}", a.ratio.value),
                        fmt::format("{:.4f} - {:.4f}", a.ratio.low, a.ratio.high), verdict_text(a.verdict)});
  return out;
}

std::string csv_text(const std::string& text) {
  if (text.find_first_of(",\"\n") == std::string::npos) return text;
  std::string out = "\"";
  for (const char c : text) out += c == '"' ? std::string("\"\"") : std::string(1, c);
  return out + "\"";
}

// The protocol as lines of a comment.
std::string csv_head(const MatrixResult& r) {
  std::string out = "# servoflow bench --matrix\n";
  for (const auto& [key, value] : r.protocol.items())
    out += "# " + key + ": " + value.dump(-1, ' ', true, Json::error_handler_t::replace) + "\n";
  return out;
}

std::string csv_arm(const ArmResult& a) {
  return fmt::format("{},{},{},{},{},{},{},{},{}", csv_text(a.arm.precision), csv_text(a.precision),
                     csv_text(a.backend), a.arm.threads, a.arm.work.views, a.arm.work.tokens,
                     a.arm.work.horizon, a.arm.work.steps, a.arm.work.batch);
}
constexpr const char* kCsvArm = "precision,ran_precision,backend,threads,views,tokens,horizon,steps,batch";

Json field(const Json& json, const char* block, const char* key) {
  return json.is_object() && json.contains(block) && json[block].is_object() ? json[block].value(key, Json())
                                                                             : Json();
}

bool same_arm(const MatrixArm& a, const MatrixArm& b) { return arm_text(a) == arm_text(b); }

}  // namespace

Result<MatrixComparison> compare_matrices(const MatrixResult& now, const MatrixResult& before,
                                          const std::string& before_path, double tolerance) {
  std::string differ;
  const auto compare = [&](const std::string& what, const Json& then, const Json& here) {
    if (then != here)
      differ += fmt::format("{}{} was {}, is {}", differ.empty() ? "" : "; ", what, then.dump(), here.dump());
  };
  for (const char* key : {"model", "checkpoint"})
    compare(key, before.matrix.value(key, Json()), now.matrix.value(key, Json()));
  for (const char* key : {"cpu", "cores"})
    compare(key, field(before.protocol, "machine", key), field(now.protocol, "machine", key));
  MatrixComparison out{.before = before_path, .tolerance = tolerance};
  for (const ArmResult& a : now.arms) {
    const auto old = std::find_if(before.arms.begin(), before.arms.end(),
                                  [&](const ArmResult& b) { return same_arm(a.arm, b.arm); });
    if (old == before.arms.end()) {
      out.only_now.push_back(arm_text(a.arm));
      continue;
    }
    if (a.hardware != old->hardware) compare("the GPU of " + arm_text(a.arm), old->hardware, a.hardware);
    out.same_actions = out.same_actions && a.actions == old->actions;
    out.arms.push_back({.arm = a.arm,
                        .before_ms = quantile(stage(*old, &MatrixRound::end_to_end), 0.5),
                        .now_ms = quantile(stage(a, &MatrixRound::end_to_end), 0.5)});
  }
  for (const ArmResult& b : before.arms)
    if (std::none_of(now.arms.begin(), now.arms.end(),
                     [&](const ArmResult& a) { return same_arm(a.arm, b.arm); }))
      out.only_before.push_back(arm_text(b.arm));
  if (!differ.empty())
    return Status::invalid("--compare " + before_path +
                           ": measured elsewhere, which says nothing about a change: " + differ);
  if (out.arms.empty())
    return Status::invalid("--compare " + before_path + ": has no arm in common with this matrix");
  out.level = 1 - 0.05 / static_cast<double>(out.arms.size());
  for (ArmComparison& c : out.arms) {
    const auto find = [&](const MatrixResult& r) {
      return std::find_if(r.arms.begin(), r.arms.end(),
                          [&](const ArmResult& a) { return same_arm(a.arm, c.arm); })
          ->end_to_end();
    };
    // Enough draws that some lie beyond the interval's ends.
    const int resamples = std::clamp(static_cast<int>(40 / (1 - out.level)), 2000, 20000);
    c.ratio = bootstrap_ratio(find(now), find(before), 0.5, {.level = out.level, .resamples = resamples});
    c.verdict = judge_ratio(c.ratio, tolerance);
  }
  return out;
}

Status comparison_outcome(const MatrixComparison& c) {
  std::string slower;
  for (const ArmComparison& a : c.arms)
    if (a.verdict == Verdict::kSlower)
      slower +=
          fmt::format("{}{}: {:.1f} % slower than in {} (at least {:.1f} %)", slower.empty() ? "" : "\n",
                      arm_text(a.arm), 100 * (a.ratio.value - 1), c.before, 100 * (a.ratio.low - 1));
  return slower.empty() ? Status() : Status::check_failed(slower);
}

std::string comparison_text(const MatrixComparison& c) {
  std::string out = "\n" + comparison_table(c).caption + "\n\n" + markdown_table(comparison_table(c));
  out += fmt::format("\nslower and faster: the whole interval lies more than {:.1f} % beyond 1; actions {}\n",
                     100 * c.tolerance,
                     c.same_actions ? "have the same bits in both" : "DIFFER between the two");
  for (const std::string& a : c.only_before) out += "only before: " + a + "\n";
  for (const std::string& a : c.only_now) out += "only now: " + a + "\n";
  return out;
}

Json comparison_to_json(const MatrixComparison& c) {
  Json arms = Json::array();
  for (const ArmComparison& a : c.arms)
    arms.push_back({{"arm", arm_text(a.arm)},
                    {"before_ms", a.before_ms},
                    {"now_ms", a.now_ms},
                    {"ratio", a.ratio.value},
                    {"low", a.ratio.low},
                    {"high", a.ratio.high},
                    {"verdict", verdict_text(a.verdict)}});
  return {{"before", c.before},
          {"tolerance", c.tolerance},
          {"level", c.level},
          {"arms", std::move(arms)},
          {"only_before", c.only_before},
          {"only_now", c.only_now},
          {"same_actions", c.same_actions}};
}

std::string matrix_text(const MatrixResult& r) {
  const ArmResult& first = r.arms.front();
  std::string out =
      fmt::format("{} arms in {} rounds on {}{}{}\n\n", r.arms.size(), r.rounds_wanted, first.backend,
                  first.hardware.empty() ? "" : ", " + first.hardware, r.complete() ? "" : "; NOT COMPLETE");
  out += markdown_table(summary_table(r));
  for (const ArmResult& a : r.arms)
    if (!a.same_actions) out += "\nactions DIFFER between the rounds of " + arm_text(a.arm) + "\n";
  return out;
}

std::string matrix_samples_csv(const MatrixResult& r) {
  std::string out =
      csv_head(r) + kCsvArm +
      ",round,sample,end_to_end_ms,preprocess_ms,vision_ms,prefix_ms,denoise_ms,postprocess_ms\n";
  for (const ArmResult& a : r.arms)
    for (std::size_t n = 0; n < a.rounds.size(); ++n) {
      const MatrixRound& m = a.rounds[n];
      const auto at = [](const std::vector<double>& x, std::size_t i) {
        return i < x.size() ? fmt::format("{}", x[i]) : "";
      };
      for (std::size_t i = 0; i < m.end_to_end.size(); ++i)
        out += fmt::format("{},{},{},{},{},{},{},{},{}\n", csv_arm(a), n, i, at(m.end_to_end, i),
                           at(m.preprocess, i), at(m.vision, i), at(m.prefix, i), at(m.denoise, i),
                           at(m.postprocess, i));
    }
  return out;
}

std::string matrix_summary_csv(const MatrixResult& r) {
  std::string out = csv_head(r) + kCsvArm;
  for (const char* p : {"p50", "p95", "p99"}) out += fmt::format(",{0}_ms,{0}_low,{0}_high", p);
  out += ",hz,device_bytes,ready_s,samples\n";
  for (const ArmResult& a : r.arms) {
    const std::size_t count = stage(a, &MatrixRound::end_to_end).size();
    if (count == 0) continue;
    out += csv_arm(a);
    double p50 = 0;
    for (const double share : {0.5, 0.95, 0.99}) {
      const Interval i = bootstrap_quantile(a.end_to_end(), share);
      out += fmt::format(",{},{},{}", i.value, i.low, i.high);
      if (share == 0.5) p50 = i.value;
    }
    out += fmt::format(",{},{},{},{}\n", 1000 / p50, a.device_bytes, a.ready_s, count);
  }
  return out;
}

HtmlReport matrix_html(const MatrixResult& r, const MatrixComparison* comparison) {
  const ArmResult& first = r.arms.front();
  HtmlReport out(fmt::format(
      "servoflow bench: {} on {}",
      r.matrix.value("model", "").empty() ? r.matrix.value("checkpoint", "") : r.matrix.value("model", ""),
      first.hardware.empty() ? first.backend : first.hardware));
  out.paragraph(fmt::format(
      "{} arms, {} rounds of turns{}. Milliseconds from frames in host memory to robot actions in host "
      "memory.",
      r.arms.size(), r.rounds_wanted, r.complete() ? "" : "; the run is not complete"));
  if (comparison != nullptr) {
    out.section("Against an earlier result");
    out.table(comparison_table(*comparison));
    Json names = Json::array(), ratios = Json::array(), up = Json::array(), down = Json::array();
    for (const ArmComparison& a : comparison->arms) {
      names.push_back(short_name(a.arm, r.arms));
      ratios.push_back(a.ratio.value);
      up.push_back(a.ratio.high - a.ratio.value);
      down.push_back(a.ratio.value - a.ratio.low);
    }
    out.figure(
        "Median time now / before; below 1 is faster. Bars are the intervals.",
        Json::array(
            {{{"type", "scatter"},
              {"mode", "markers"},
              {"x", names},
              {"y", ratios},
              {"error_y", {{"type", "data"}, {"symmetric", false}, {"array", up}, {"arrayminus", down}}}}}),
        {{"yaxis", {{"title", {{"text", "now / before"}}}}}});
  }
  out.section("Results");
  out.table(summary_table(r));
  Json names = Json::array(), p50 = Json::array(), up = Json::array(), down = Json::array();
  Json boxes = Json::array(), stages = Json::array(), series = Json::array();
  for (const ArmResult& a : r.arms) {
    const std::vector<double> all = stage(a, &MatrixRound::end_to_end);
    if (all.empty()) continue;
    const std::string name = short_name(a.arm, r.arms);
    const Interval i = bootstrap_quantile(a.end_to_end(), 0.5);
    names.push_back(name);
    p50.push_back(i.value);
    up.push_back(i.high - i.value);
    down.push_back(i.value - i.low);
    boxes.push_back({{"type", "box"}, {"name", name}, {"y", all}, {"boxpoints", "outliers"}});
    series.push_back({{"type", "scatter"}, {"mode", "markers"}, {"name", name}, {"y", all}});
  }
  for (const auto& [name, values] :
       {std::pair("vision", &MatrixRound::vision), std::pair("prefix", &MatrixRound::prefix),
        std::pair("denoise", &MatrixRound::denoise)}) {
    Json y = Json::array();
    for (const ArmResult& a : r.arms)
      if (!stage(a, &MatrixRound::end_to_end).empty()) y.push_back(quantile(stage(a, values), 0.5));
    stages.push_back({{"type", "bar"}, {"name", name}, {"x", names}, {"y", std::move(y)}});
  }
  const Json ms_axis = {{"title", {{"text", "ms"}}}, {"rangemode", "tozero"}};
  out.figure("Medians with their 95 % intervals.",
             Json::array({{{"type", "bar"},
                           {"x", names},
                           {"y", p50},
                           {"error_y",
                            {{"type", "data"}, {"symmetric", false}, {"array", up}, {"arrayminus", down}}}}}),
             {{"yaxis", ms_axis}});
  out.figure("Medians of the three stages.", std::move(stages), {{"barmode", "stack"}, {"yaxis", ms_axis}});
  out.figure("All samples.", std::move(boxes), {{"yaxis", ms_axis}, {"showlegend", false}});
  out.figure("All samples in the order they were taken: a drift would show here.", std::move(series),
             {{"xaxis", {{"title", {{"text", "sample"}}}}}, {"yaxis", ms_axis}});
  out.section("Protocol");
  HtmlTable protocol{.header = {"", ""}};
  for (const auto& [key, value] : r.protocol.items())
    protocol.rows.push_back({key, value.is_string()
                                      ? value.get<std::string>()
                                      : value.dump(-1, ' ', false, Json::error_handler_t::replace)});
  out.table(protocol);
  out.data("matrix", matrix_to_json(r));
  return out;
}

Status write_matrix(const MatrixResult& r, const MatrixComparison* comparison, const std::string& folder) {
  const auto path = [&](const char* name) { return (std::filesystem::path(folder) / name).string(); };
  Json json = matrix_to_json(r);
  if (comparison != nullptr) json["comparison"] = comparison_to_json(*comparison);
  SF_RETURN_IF_ERROR(write_file_atomically(path("matrix.json"), json_text(json) + "\n"));
  SF_RETURN_IF_ERROR(write_file_atomically(path("samples.csv"), matrix_samples_csv(r)));
  SF_RETURN_IF_ERROR(write_file_atomically(path("summary.csv"), matrix_summary_csv(r)));
  return matrix_html(r, comparison).write(path("report.html"));
}

}  // namespace servoflow::toolkit
