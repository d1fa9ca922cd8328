// How a verify report reads: text for people, JSON for programs.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "toolkit/verify.h"

namespace servoflow::toolkit {
namespace {

// The worst of one stage group over all cases.
struct GroupSummary {
  std::string group;
  int records = 0, judged = 0, failed = 0;
  double max_abs = 0, relative = 0, rms_error = 0, cosine = 1, headroom = kMaxHeadroom;
  Gates gates;
};

// A NaN is worse than any number.
double worse(double a, double b) { return std::isnan(a) || std::isnan(b) ? NAN : std::max(a, b); }

std::vector<GroupSummary> summarize(const std::vector<Record>& records) {
  std::vector<GroupSummary> out;
  for (const Record& r : records) {
    auto it = std::find_if(out.begin(), out.end(), [&](const GroupSummary& g) { return g.group == r.group; });
    if (it == out.end()) it = out.insert(out.end(), {.group = r.group});
    ++it->records;
    it->max_abs = worse(it->max_abs, r.max_abs);
    it->relative = worse(it->relative, r.relative);
    it->rms_error = worse(it->rms_error, r.rms_error);
    it->cosine = -worse(-it->cosine, -r.cosine);
    if (!r.judged) continue;
    ++it->judged;
    it->failed += r.pass ? 0 : 1;
    if (r.headroom <= it->headroom) {
      it->headroom = r.headroom;
      it->gates = r.gates;
    }
  }
  std::stable_sort(out.begin(), out.end(), [](const GroupSummary& a, const GroupSummary& b) {
    return pipeline_rank(a.group) < pipeline_rank(b.group);
  });
  return out;
}

std::string gates_text(const Gates& g) {
  std::string out;
  const auto add = [&](const char* name, const std::optional<double>& value, const char* sign) {
    if (value) out += fmt::format("{}{} {} {:g}", out.empty() ? "" : ", ", name, sign, *value);
  };
  if (g.max && *g.max == 0) return "exact";
  add("max", g.max, "<=");
  add("rms", g.rms, "<=");
  add("cos", g.cosine, ">=");
  return out.empty() ? "not judged" : out;
}

std::string headroom_text(double headroom, bool judged) {
  if (!judged) return "-";
  return headroom >= kMaxHeadroom ? "equal" : fmt::format("{:.3g}x", headroom);
}

const char* verdict(int judged, int failed) { return judged == 0 ? "-" : failed > 0 ? "FAIL" : "pass"; }

constexpr char kRow[] = "{:<36} {:>7} {:>10} {:>10} {:>10} {:>11} {:>8}  {:<5} {}\n";

std::string record_row(const Record& r) {
  return fmt::format(kRow, r.case_name + " " + r.stage, "", fmt::format("{:.2e}", r.max_abs),
                     fmt::format("{:.2e}", r.relative), fmt::format("{:.2e}", r.rms_error),
                     fmt::format("{:.8f}", r.cosine), headroom_text(r.headroom, r.judged),
                     verdict(r.judged, r.pass ? 0 : 1), r.note.empty() ? gates_text(r.gates) : r.note);
}

}  // namespace

std::string verify_text(const VerifyReport& report, bool all) {
  std::string out = fmt::format("{} ({}): {} cases from {}\nran on {}, {}, {} threads\n\n", report.checkpoint,
                                report.layout, report.case_count, report.cases, report.backend,
                                report.precision, report.threads);
  const std::string header = fmt::format(kRow, "stage (worst of all cases)", "records", "max abs", "max/rms",
                                         "rms/rms", "cosine", "headroom", "", "gate");
  out += header;
  for (const GroupSummary& g : summarize(report.records))
    out += fmt::format(kRow, g.group, g.records, fmt::format("{:.2e}", g.max_abs),
                       fmt::format("{:.2e}", g.relative), fmt::format("{:.2e}", g.rms_error),
                       fmt::format("{:.8f}", g.cosine), headroom_text(g.headroom, g.judged > 0),
                       verdict(g.judged, g.failed), gates_text(g.gates));
  std::string rows;
  for (const Record& r : report.records)
    if (all || (r.judged && !r.pass)) rows += record_row(r);
  if (!rows.empty()) out += std::string(all ? "\nevery record\n" : "\nfailed\n") + rows;
  out += fmt::format(
      "\nHeadroom: how many times the error fits into the gate. max and rms are shares of the expectation's "
      "rms; actions "
      "are\njudged per column, on the scale of the robot's statistics.\n");
  return out + fmt::format("{} passed, {} failed\n", report.passed, report.failed);
}

Json verify_to_json(const VerifyReport& report) {
  Json records = Json::array();
  for (const Record& r : report.records) records.push_back(record_to_json(r));
  return {{"checkpoint", report.checkpoint}, {"layout", report.layout},   {"cases", report.cases},
          {"case_count", report.case_count}, {"device", report.device},   {"backend", report.backend},
          {"precision", report.precision},   {"threads", report.threads}, {"records", std::move(records)},
          {"notes", report.notes},           {"passed", report.passed},   {"failed", report.failed}};
}

}  // namespace servoflow::toolkit
