// A report as one HTML file that works offline and can be sent around: text, tables, interactive figures and
// the data behind them. Every string that comes in is text and is escaped; nothing in the file refers to the
// network, and its content policy forbids the browser to go there.
#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/json.h"
#include "servoflow/status.h"
#include "toolkit/plotly_blob.h"

namespace servoflow::toolkit {

// Rows may be shorter than the header. A column is aligned to the right if all its cells begin like numbers.
struct HtmlTable {
  std::string caption;
  std::vector<std::string> header;
  std::vector<std::vector<std::string>> rows;
};

class HtmlReport {
 public:
  explicit HtmlReport(std::string title) : title_(std::move(title)) {}

  // A section begins; its heading is a link within the file.
  HtmlReport& section(const std::string& heading);
  HtmlReport& paragraph(const std::string& text);
  // Text whose line breaks and columns matter.
  HtmlReport& preformatted(const std::string& text);
  HtmlReport& table(const HtmlTable& table);
  // `traces` is an array and `layout` an object, as Plotly.newPlot takes them; anything else makes html()
  // fail. NaN and infinity become null, which Plotly draws as a gap.
  HtmlReport& figure(const std::string& caption, Json traces, Json layout);
  // Rides along as <script type="application/json" id="data-NAME">: programs can read the file too.
  HtmlReport& data(const std::string& name, const Json& json);

  // The whole file. Fails when there are figures and no plotly.js to draw them.
  Result<std::string> html(const PlotlyBlob& plotly = plotly_blob()) const;
  // Writes under a temporary name and renames; the path must end in .html.
  Status write(const std::string& path) const;

 private:
  std::string title_, body_, data_;
  std::vector<std::pair<std::string, std::string>> sections_;  // id, heading
  Json figures_ = Json::array();
  std::string problem_;
};

// The error that write() would give for this name, before the work is done.
Status check_html_path(const std::string& path);

// Text for HTML, attributes included: & < > " ' as entities, control characters and bytes that are not UTF-8
// as U+FFFD.
std::string html_escaped(std::string_view text);
// JSON that may stand inside a <script>: no "<", ">" or "&" in it, and no line separators of JavaScript.
std::string json_for_script(const Json& json);

}  // namespace servoflow::toolkit
