#include "toolkit/trace.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>

namespace servoflow::toolkit {
namespace {

double milliseconds(const zones::Event& e) { return static_cast<double>(e.end_ns - e.begin_ns) / 1e6; }

// 1e9 per second; 0 for nothing in no time.
double giga_rate(double amount, double ms) { return ms > 0 ? amount / ms / 1e6 : 0; }

}  // namespace

Json trace_to_json(std::span<const zones::Event> events) {
  std::uint64_t start = events.empty() ? 0 : events.front().begin_ns;
  for (const zones::Event& e : events) start = std::min(start, e.begin_ns);
  Json list = Json::array();
  for (const zones::Event& e : events) {
    const std::string name = e.name;
    Json one = {{"name", name},
                {"cat", name.substr(0, name.find('/'))},
                {"ph", "X"},
                {"ts", static_cast<double>(e.begin_ns - start) / 1e3},
                {"dur", static_cast<double>(e.end_ns - e.begin_ns) / 1e3},
                {"pid", 1},
                {"tid", e.thread}};
    if (e.flops > 0) one["args"]["gflops"] = giga_rate(e.flops, milliseconds(e));
    if (e.bytes > 0) one["args"]["gbs"] = giga_rate(e.bytes, milliseconds(e));
    list.push_back(std::move(one));
  }
  return {{"traceEvents", std::move(list)}, {"displayTimeUnit", "ms"}};
}

std::vector<Component> component_table(std::span<const zones::Event> events) {
  // Parents before children: earlier begin first, and of two that begin together the longer one.
  std::vector<const zones::Event*> order;
  for (const zones::Event& e : events) order.push_back(&e);
  std::sort(order.begin(), order.end(), [](const zones::Event* a, const zones::Event* b) {
    return a->begin_ns != b->begin_ns ? a->begin_ns < b->begin_ns : a->end_ns > b->end_ns;
  });

  std::map<std::string, Component> rows;
  std::map<int, std::vector<const zones::Event*>> open;  // per thread, outermost first
  for (const zones::Event* e : order) {
    std::vector<const zones::Event*>& stack = open[e->thread];
    while (!stack.empty() && stack.back()->end_ns <= e->begin_ns) stack.pop_back();
    Component& row = rows[e->name];
    row.name = e->name;
    ++row.calls;
    row.ms += milliseconds(*e);
    row.flops += e->flops;
    row.bytes += e->bytes;
    if (!stack.empty()) rows[stack.back()->name].ms -= milliseconds(*e);
    stack.push_back(e);
  }
  std::vector<Component> out;
  for (auto& [name, row] : rows) out.push_back(std::move(row));
  std::stable_sort(out.begin(), out.end(),
                   [](const Component& a, const Component& b) { return a.ms > b.ms; });
  return out;
}

std::string component_text(const std::vector<Component>& table) {
  double total = 0;
  for (const Component& c : table) total += c.ms;
  std::string out = fmt::format("{:<28}{:>7}{:>12}{:>8}{:>11}{:>9}\n", "component", "calls", "ms", "share",
                                "GFLOP/s", "GB/s");
  for (const Component& c : table) {
    const double flops = giga_rate(c.flops, c.ms), bytes = giga_rate(c.bytes, c.ms);
    out += fmt::format("{:<28}{:>7}{:>12.3f}{:>7.1f}%{:>11}{:>9}\n", c.name, c.calls, c.ms,
                       total > 0 ? 100 * c.ms / total : 0, flops > 0 ? fmt::format("{:.1f}", flops) : "-",
                       bytes > 0 ? fmt::format("{:.1f}", bytes) : "-");
  }
  return out;
}

Json components_to_json(const std::vector<Component>& table) {
  Json out = Json::array();
  for (const Component& c : table)
    out.push_back({{"name", c.name},
                   {"calls", c.calls},
                   {"ms", c.ms},
                   {"gflop", c.flops / 1e9},
                   {"gb", c.bytes / 1e9}});
  return out;
}

}  // namespace servoflow::toolkit
