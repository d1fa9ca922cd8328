#include "toolkit/html_report.h"

#include <fmt/format.h>
#include <zlib.h>

#include <algorithm>
#include <cctype>
#include <filesystem>

#include "core/file.h"
#include "core/status_macros.h"

namespace servoflow::toolkit {
namespace {

constexpr std::size_t kMaxScript = std::size_t{64} << 20;

// default-src 'none' is what keeps the file off the network. Plotly needs inline scripts and styles, makes
// functions at run time for some kinds of traces, and keeps pictures in data: and blob: addresses.
constexpr const char* kPolicy =
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; "
    "img-src data: blob:; font-src data:";

constexpr const char* kStyle = R"css(
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2024; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: .3rem; }
h2 { font-size: 1.25rem; margin-top: 2.2rem; border-bottom: 1px solid #d5dae0; padding-bottom: .2rem; }
nav a { margin-right: 1rem; }
a { color: #0b5cad; text-decoration: none; }
table { border-collapse: collapse; margin: .6rem 0 1.2rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #e3e7eb; text-align: left; vertical-align: top; }
thead th { border-bottom: 2px solid #9aa5b1; }
.n { text-align: right; white-space: nowrap; }
pre { background: #f4f6f8; padding: .7rem; overflow-x: auto; font-size: 13px; }
figure { margin: 1rem 0; } figcaption { color: #4a5560; }
.plot { min-height: 420px; } .wide { overflow-x: auto; }
@media print { nav { display: none; } body { max-width: none; } }
)css";

constexpr const char* kDraw = R"js(
for (const [i, f] of JSON.parse(document.getElementById("figures").textContent).entries())
  Plotly.newPlot("figure-" + i, f.traces, f.layout, {responsive: true, displaylogo: false});
)js";

Result<std::string> decompressed(std::string_view bytes) {
  std::string out;
  z_stream stream{};
  if (inflateInit(&stream) != Z_OK) return Status::runtime("HTML report: zlib has no memory");
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(bytes.data()));
  stream.avail_in = static_cast<uInt>(bytes.size());
  int state = Z_OK;
  while (state == Z_OK && out.size() < kMaxScript) {
    const std::size_t have = out.size();
    out.resize(have + (std::size_t{1} << 20));
    stream.next_out = reinterpret_cast<Bytef*>(out.data() + have);
    stream.avail_out = 1u << 20;
    state = inflate(&stream, Z_NO_FLUSH);
    out.resize(out.size() - stream.avail_out);
  }
  inflateEnd(&stream);
  if (state != Z_STREAM_END)
    return Status::runtime(
        "HTML report: the plotly.js in this binary cannot be decompressed; build it again");
  return out;
}

// Text in UTF-8 whatever came in: the JSON library replaces what is not.
std::string utf8(std::string_view text) {
  const std::string quoted = Json(std::string(text)).dump(-1, ' ', false, Json::error_handler_t::replace);
  return Json::parse(quoted).get<std::string>();
}

bool like_a_number(const std::string& cell) {
  const std::size_t at = cell.find_first_not_of("+-~<>≤≥≈ ");
  if (cell == "-" || cell.empty()) return true;
  return at != std::string::npos && (std::isdigit(static_cast<unsigned char>(cell[at])) != 0);
}

std::string cell(const char* tag, const std::string& text, bool number) {
  return fmt::format("<{0}{1}>{2}</{0}>", tag, number ? " class=\"n\"" : "", html_escaped(text));
}

}  // namespace

std::string html_escaped(std::string_view text) {
  std::string out;
  for (const char c : utf8(text)) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      case '\'':
        out += "&#39;";
        break;
      default:
        if ((static_cast<unsigned char>(c) < 0x20 && c != '\n' && c != '\t') || c == 0x7f)
          out += "\xEF\xBF\xBD";
        else
          out += c;
    }
  }
  return out;
}

std::string json_for_script(const Json& json) {
  // Beyond strings JSON has none of these characters. In ASCII there are no line separators either.
  std::string out;
  for (const char c : json.dump(-1, ' ', true, Json::error_handler_t::replace)) {
    if (c == '<' || c == '>' || c == '&')
      out += fmt::format("\\u{:04x}", static_cast<unsigned>(c));
    else
      out += c;
  }
  return out;
}

HtmlReport& HtmlReport::section(const std::string& heading) {
  const std::string id = fmt::format("section-{}", sections_.size());
  sections_.emplace_back(id, heading);
  body_ += fmt::format("<h2 id=\"{0}\"><a href=\"#{0}\">{1}</a></h2>\n", id, html_escaped(heading));
  return *this;
}

HtmlReport& HtmlReport::paragraph(const std::string& text) {
  body_ += "<p>" + html_escaped(text) + "</p>\n";
  return *this;
}

HtmlReport& HtmlReport::preformatted(const std::string& text) {
  body_ += "<pre>" + html_escaped(text) + "</pre>\n";
  return *this;
}

HtmlReport& HtmlReport::table(const HtmlTable& t) {
  std::vector<bool> number(t.header.size(), !t.rows.empty());
  for (const auto& row : t.rows) {
    if (row.size() > t.header.size() && problem_.empty())
      problem_ = fmt::format("table \"{}\": a row has {} cells, the header {}", t.caption, row.size(),
                             t.header.size());
    for (std::size_t c = 0; c < std::min(row.size(), number.size()); ++c)
      number[c] = number[c] && like_a_number(row[c]);
  }
  body_ += "<div class=\"wide\"><table>\n";
  if (!t.caption.empty()) body_ += "<caption>" + html_escaped(t.caption) + "</caption>\n";
  body_ += "<thead><tr>";
  for (std::size_t c = 0; c < t.header.size(); ++c) body_ += cell("th", t.header[c], number[c]);
  body_ += "</tr></thead>\n<tbody>\n";
  for (const auto& row : t.rows) {
    body_ += "<tr>";
    for (std::size_t c = 0; c < row.size(); ++c) body_ += cell("td", row[c], c < number.size() && number[c]);
    body_ += "</tr>\n";
  }
  body_ += "</tbody></table></div>\n";
  return *this;
}

HtmlReport& HtmlReport::figure(const std::string& caption, Json traces, Json layout) {
  if ((!traces.is_array() || !layout.is_object()) && problem_.empty())
    problem_ = fmt::format("figure \"{}\": traces are {} and the layout is {}; they must be array and object",
                           caption, json_kind(traces), json_kind(layout));
  body_ +=
      fmt::format("<figure><div class=\"plot\" id=\"figure-{}\"></div><figcaption>{}</figcaption></figure>\n",
                  figures_.size(), html_escaped(caption));
  figures_.push_back({{"traces", std::move(traces)}, {"layout", std::move(layout)}});
  return *this;
}

HtmlReport& HtmlReport::data(const std::string& name, const Json& json) {
  data_ += fmt::format("<script type=\"application/json\" id=\"data-{}\">{}</script>\n", html_escaped(name),
                       json_for_script(json));
  return *this;
}

Result<std::string> HtmlReport::html(const PlotlyBlob& plotly) const {
  if (!problem_.empty()) return Status::invalid("HTML report: " + problem_);
  std::string script;
  if (!figures_.empty()) {
    if (plotly.compressed.empty())
      return Status::runtime(fmt::format(
          "HTML report: its figures need plotly.js, and {}. Configure the build again with network "
          "(`cmake --preset release`), or with -DSF_PLOTLY_DIR=FOLDER where an earlier build kept it",
          plotly.why.empty() ? "it is not in this binary" : plotly.why));
    SF_ASSIGN_OR_RETURN(script, decompressed(plotly.compressed));
  }
  std::string out = fmt::format(
      "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n"
      "<meta http-equiv=\"Content-Security-Policy\" content=\"{}\">\n"
      "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n"
      "<title>{}</title>\n<style>{}</style>\n",
      kPolicy, html_escaped(title_), kStyle);
  if (!script.empty()) out += "<script>" + script + "</script>\n";
  out += "</head>\n<body>\n<h1>" + html_escaped(title_) + "</h1>\n";
  if (sections_.size() > 2) {
    out += "<nav>";
    for (const auto& [id, heading] : sections_)
      out += fmt::format("<a href=\"#{}\">{}</a>", id, html_escaped(heading));
    out += "</nav>\n";
  }
  out += body_ + data_;
  if (!figures_.empty()) {
    out += "<noscript><p>The figures need JavaScript; the tables do not.</p></noscript>\n";
    out += "<script type=\"application/json\" id=\"figures\">" + json_for_script(figures_) + "</script>\n";
    out += std::string("<script>") + kDraw + "</script>\n";
  }
  return out + "</body>\n</html>\n";
}

Status check_html_path(const std::string& path) {
  if (std::filesystem::path(path).extension() == ".html") return {};
  return Status::invalid(path + ": a report is HTML, its name must end in .html");
}

Status HtmlReport::write(const std::string& path) const {
  SF_RETURN_IF_ERROR(check_html_path(path));
  SF_ASSIGN_OR_RETURN(const std::string text, html());
  return write_file_atomically(path, text);
}

}  // namespace servoflow::toolkit
