// What trace zones say about one inference: a file for chrome://tracing (or ui.perfetto.dev), and a table per
// component.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "core/json.h"
#include "core/zones.h"

namespace servoflow::toolkit {

// {"traceEvents": […], "displayTimeUnit": "ms"}; times start at 0 with the first event.
Json trace_to_json(std::span<const zones::Event> events);

struct Component {
  std::string name;  // the zone's: "prefix/mlp"
  int calls = 0;
  double ms = 0;                // inside the zone, without the zones nested in it on the same thread
  double flops = 0, bytes = 0;  // as far as zones know them
};

// One row per zone name, longest first.
std::vector<Component> component_table(std::span<const zones::Event> events);

std::string component_text(const std::vector<Component>& table);
Json components_to_json(const std::vector<Component>& table);

}  // namespace servoflow::toolkit
