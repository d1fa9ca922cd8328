#include "toolkit/html_report.h"

#include <gtest/gtest.h>
#include <zlib.h>

#include <cmath>
#include <filesystem>
#include <limits>
#include <regex>

#include "core/file.h"

namespace servoflow::toolkit {
namespace {

// A stand-in for plotly.js, so that what is looked for in a file is this project's own.
std::string small_script() { return "var Plotly = {newPlot() {}};"; }

std::string compressed(const std::string& text) {
  uLongf size = compressBound(text.size());
  std::string out(size, '\0');
  EXPECT_EQ(compress(reinterpret_cast<Bytef*>(out.data()), &size, reinterpret_cast<const Bytef*>(text.data()),
                     text.size()),
            Z_OK);
  out.resize(size);
  return out;
}

HtmlReport hostile() {
  const std::string bad = "</script><script>alert('x')</script>\"&<img src=x onerror=y>\x01\xff";
  HtmlReport report(bad);
  report.section(bad).paragraph(bad).preformatted(bad);
  report.table({.caption = bad, .header = {bad, "ms"}, .rows = {{bad, "1.5"}}});
  report.figure(bad, {{{"name", bad}, {"y", {1, 2}}}}, {{"title", {{"text", bad}}}});
  report.data("raw", {{bad, bad}});
  return report;
}

std::string text_of(const HtmlReport& report) {
  const std::string script = compressed(small_script());
  const Result<std::string> html = report.html({script, ""});
  EXPECT_TRUE(html.ok()) << html.status().message();
  return html.ok() ? *html : "";
}

// What stands in <script type="application/json" id="ID">.
Json block(const std::string& html, const std::string& id) {
  const std::string open = "<script type=\"application/json\" id=\"" + id + "\">";
  const std::size_t begin = html.find(open);
  EXPECT_NE(begin, std::string::npos) << id;
  const std::size_t from = begin + open.size();
  return Json::parse(html.substr(from, html.find("</script>", from) - from));
}

TEST(HtmlReport, EscapesTextWhereverItGoes) {
  EXPECT_EQ(html_escaped("a<b>&\"c'\n"), "a&lt;b&gt;&amp;&quot;c&#39;\n");
  EXPECT_EQ(html_escaped(std::string("\x01\xff\0", 3)), "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD");
  EXPECT_EQ(html_escaped("π ≤ 5"), "π ≤ 5");
  const std::string html = text_of(hostile());
  EXPECT_EQ(html.find("<script>alert"), std::string::npos);
  EXPECT_EQ(html.find("<img"), std::string::npos);
  // Plotly's, the data, the figures and what draws them: no string of the user opened or closed another one.
  const std::regex opening("<script"), closing("</script>");
  const auto count = [&](const std::regex& what) {
    return std::distance(std::sregex_iterator(html.begin(), html.end(), what), std::sregex_iterator());
  };
  EXPECT_EQ(count(opening), 4);
  EXPECT_EQ(count(closing), 4);
}

TEST(HtmlReport, NeedsNoNetwork) {
  const std::string html = text_of(hostile());
  EXPECT_EQ(html.find("http://"), std::string::npos);
  EXPECT_EQ(html.find("https://"), std::string::npos);
  EXPECT_EQ(html.find("<link"), std::string::npos);
  EXPECT_FALSE(std::regex_search(html, std::regex("<[^>]*\\ssrc=")));
  EXPECT_FALSE(std::regex_search(html, std::regex("<[^>]*\\shref=\"[^#]")));
  EXPECT_FALSE(std::regex_search(html, std::regex("@import|url\\(")));
  EXPECT_NE(html.find("default-src 'none'"), std::string::npos);
}

TEST(HtmlReport, DataAndFiguresReadBackAsTheyWereGiven) {
  const Json data = {
      {"text", "</script> & π"}, {"list", {1, 2.5, nullptr, true}}, {"deep", {{"x", {{"y", -1e-300}}}}}};
  const Json traces = Json::array({{{"type", "bar"}, {"x", {"a<b", "c"}}, {"y", {1.25, 2}}}});
  const Json layout = {{"title", {{"text", "p95 < 5 ms"}}}};
  HtmlReport report("t");
  report.data("raw", data).figure("f", traces, layout);
  const std::string html = text_of(report);
  EXPECT_EQ(block(html, "data-raw"), data);
  const Json figures = block(html, "figures");
  ASSERT_EQ(figures.size(), 1u);
  EXPECT_EQ(figures[0]["traces"], traces);
  EXPECT_EQ(figures[0]["layout"], layout);
  EXPECT_NE(html.find(small_script()), std::string::npos);
}

TEST(HtmlReport, NumbersThatJsonLacksBecomeGaps) {
  HtmlReport report("t");
  report.figure("f", Json::array({{{"y", {1.0, std::nan(""), std::numeric_limits<double>::infinity()}}}}),
                Json::object());
  EXPECT_EQ(block(text_of(report), "figures")[0]["traces"][0]["y"], Json({1.0, nullptr, nullptr}));
}

TEST(HtmlReport, ColumnsOfNumbersAreAlignedToTheRight) {
  HtmlReport report("t");
  report.table({.header = {"name", "ms"}, .rows = {{"a", "1.5"}, {"b", "-"}, {"c", "≈ 3"}}});
  const std::string html = text_of(report);
  EXPECT_NE(html.find("<th>name</th><th class=\"n\">ms</th>"), std::string::npos);
  EXPECT_NE(html.find("<td>c</td><td class=\"n\">≈ 3</td>"), std::string::npos);
}

TEST(HtmlReport, WithoutPlotlyFiguresAreAnErrorAndTablesAreNot) {
  HtmlReport report("t");
  report.table({.header = {"a"}, .rows = {{"1"}}});
  EXPECT_TRUE(report.html({"", "nobody fetched it"}).ok());
  report.figure("f", Json::array(), Json::object());
  const Result<std::string> html = report.html({"", "nobody fetched it"});
  ASSERT_FALSE(html.ok());
  EXPECT_EQ(html.status().code(), StatusCode::kRuntime);
  EXPECT_NE(html.status().message().find("nobody fetched it"), std::string::npos);
  EXPECT_NE(html.status().message().find("Configure the build again"), std::string::npos);
}

TEST(HtmlReport, BrokenPartsAreErrors) {
  HtmlReport figure("t");
  figure.figure("speed", Json::object(), Json::object());
  ASSERT_FALSE(figure.html().ok());
  EXPECT_NE(figure.html().status().message().find("\"speed\": traces are object"), std::string::npos);
  HtmlReport table("t");
  table.table({.caption = "rows", .header = {"a"}, .rows = {{"1", "2"}}});
  ASSERT_FALSE(table.html().ok());
  EXPECT_NE(table.html().status().message().find("a row has 2 cells, the header 1"), std::string::npos);

  HtmlReport plain("t");
  plain.figure("f", Json::array(), Json::object());
  const std::string script = compressed(small_script()), half = script.substr(0, script.size() / 2);
  for (const std::string& broken : {half, std::string("garbage"), std::string(100, '\0')})
    EXPECT_FALSE(plain.html({broken, ""}).ok());
}

TEST(HtmlReport, WritesWholeFilesWithTheRightName) {
  const std::string path = testing::TempDir() + "/sf_report.html";
  std::filesystem::remove(path);
  HtmlReport report("t");
  report.paragraph("hello");
  EXPECT_FALSE(report.write(testing::TempDir() + "/sf_report.txt").ok());
  EXPECT_FALSE(report.write("/nowhere/at/all.html").ok());
  ASSERT_TRUE(report.write(path).ok());
  const Result<std::string> text = read_text_file(path, 1 << 20);
  ASSERT_TRUE(text.ok());
  EXPECT_EQ(text->rfind("<!DOCTYPE html>", 0), 0u);
  EXPECT_NE(text->find("<p>hello</p>"), std::string::npos);
}

TEST(HtmlReport, ThePlotlyOfThisBuildIsWhole) {
  if (plotly_blob().compressed.empty()) GTEST_SKIP() << plotly_blob().why;
  HtmlReport report("t");
  report.figure("f", Json::array(), Json::object());
  const Result<std::string> html = report.html();
  ASSERT_TRUE(html.ok()) << html.status().message();
  EXPECT_GT(html->size(), 1000000u);
  EXPECT_NE(html->find("* plotly.js v"), std::string::npos);
  EXPECT_NE(html->find("window.Plotly = Plotly"), std::string::npos);
  // An inline script ends at the first of these, wherever it stands: one each for Plotly, the figures, the
  // drawing.
  std::size_t at = 0, ends = 0;
  while ((at = html->find("</script", at)) != std::string::npos) ++ends, ++at;
  EXPECT_EQ(ends, 3u);
}

}  // namespace
}  // namespace servoflow::toolkit
