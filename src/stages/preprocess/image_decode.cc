#include "stages/preprocess/image_decode.h"

#include <jerror.h>
#include <jpeglib.h>
#include <png.h>

#include <csetjmp>
#include <cstdio>
#include <cstring>
#include <new>

#include "core/file.h"
#include "core/status_macros.h"
#include "stages/preprocess/resize.h"

namespace servoflow::stages {
namespace {

constexpr std::size_t kMaxFileBytes = std::size_t{256} << 20;
constexpr std::uint8_t kPngSignature[8] = {0x89, 'P', 'N', 'G', 0x0d, 0x0a, 0x1a, 0x0a};

// Takes the pixels' memory once the header has told the size.
Status prepare(std::uint64_t width, std::uint64_t height, Image& image) {
  if (width < 1 || height < 1 || width > kMaxImageSide || height > kMaxImageSide ||
      width * height > static_cast<std::uint64_t>(kMaxImagePixels)) {
    return Status::invalid("an image of " + std::to_string(width) + "x" + std::to_string(height) +
                           " pixels; at most " + std::to_string(kMaxImageSide) +
                           " a side and 64 Mpixel in all");
  }
  image.width = static_cast<int>(width);
  image.height = static_cast<int>(height);
  try {
    image.rgb.resize(std::size_t{3} * width * height);
  } catch (const std::bad_alloc&) {
    return Status::runtime("no memory for an image of " + std::to_string(width) + "x" +
                           std::to_string(height) + " pixels");
  }
  return Status::ok_status();
}

// libpng and libjpeg report errors by longjmp. It may only cross frames whose objects need no destruction, so
// that each decoder is a struct owned by the caller and a function of plain C operations between setjmp and
// the end.
struct PngDecoder {
  png_structp png = nullptr;
  png_infop info = nullptr;
  std::span<const std::uint8_t> file;
  std::size_t position = 0;
  char message[200] = "damaged file";
  ~PngDecoder() {
    if (png != nullptr) png_destroy_read_struct(&png, info != nullptr ? &info : nullptr, nullptr);
  }
};

void png_fail(png_structp png, png_const_charp text) {
  auto* decoder = static_cast<PngDecoder*>(png_get_error_ptr(png));
  std::snprintf(decoder->message, sizeof(decoder->message), "%s", text);
  longjmp(png_jmpbuf(png), 1);
}
void png_warn(png_structp, png_const_charp) {}
void png_read_bytes(png_structp png, png_bytep out, png_size_t count) {
  auto* decoder = static_cast<PngDecoder*>(png_get_io_ptr(png));
  if (count > decoder->file.size() - decoder->position) png_error(png, "the file is cut short");
  std::memcpy(out, decoder->file.data() + decoder->position, count);
  decoder->position += count;
}

bool png_header(PngDecoder& d) {
  if (setjmp(png_jmpbuf(d.png))) return false;
  png_set_read_fn(d.png, &d, png_read_bytes);
  png_set_user_limits(d.png, kMaxImageSide, kMaxImageSide);
  png_set_chunk_cache_max(d.png, 128);
  png_set_chunk_malloc_max(d.png, png_alloc_size_t{8} << 20);
  png_read_info(d.png, d.info);
  png_set_strip_16(d.png);
  png_set_palette_to_rgb(d.png);
  png_set_expand_gray_1_2_4_to_8(d.png);
  png_set_gray_to_rgb(d.png);
  png_set_strip_alpha(d.png);
  png_set_interlace_handling(d.png);
  png_read_update_info(d.png, d.info);
  return true;
}

bool png_pixels(PngDecoder& d, std::uint8_t* pixels, std::size_t stride, png_uint_32 height, int passes) {
  if (setjmp(png_jmpbuf(d.png))) return false;
  for (int pass = 0; pass < passes; ++pass) {
    for (png_uint_32 y = 0; y < height; ++y) png_read_row(d.png, pixels + stride * y, nullptr);
  }
  png_read_end(d.png, nullptr);
  return true;
}

Status decode_png(std::span<const std::uint8_t> file, Image& image) {
  PngDecoder d;
  d.file = file;
  d.png = png_create_read_struct(PNG_LIBPNG_VER_STRING, &d, png_fail, png_warn);
  if (d.png != nullptr) d.info = png_create_info_struct(d.png);
  if (d.info == nullptr) return Status::runtime("no memory for a PNG decoder");
  if (!png_header(d)) return Status::invalid(std::string("PNG: ") + d.message);
  SF_RETURN_IF_ERROR(prepare(png_get_image_width(d.png, d.info), png_get_image_height(d.png, d.info), image));
  const std::size_t stride = std::size_t{3} * image.width;
  if (png_get_rowbytes(d.png, d.info) != stride) return Status::invalid("PNG: an unsupported pixel format");
  const int passes = png_get_interlace_type(d.png, d.info) == PNG_INTERLACE_ADAM7 ? 7 : 1;
  if (!png_pixels(d, image.rgb.data(), stride, image.height, passes))
    return Status::invalid(std::string("PNG: ") + d.message);
  return Status::ok_status();
}

struct JpegDecoder {
  jpeg_error_mgr errors;  // first, so that its address is the decoder's
  std::jmp_buf escape;
  jpeg_progress_mgr progress;
  jpeg_decompress_struct jpeg;
  bool created = false;
  char message[JMSG_LENGTH_MAX] = "damaged file";
  ~JpegDecoder() {
    if (created) jpeg_destroy_decompress(&jpeg);
  }
};

void jpeg_fail(j_common_ptr common) {
  auto* decoder = reinterpret_cast<JpegDecoder*>(common->err);
  common->err->format_message(common, decoder->message);
  std::longjmp(decoder->escape, 1);
}

// Warnings (level -1) mostly stand for missing data, which the library would paper over with gray; a robot
// must not act on that. Stray bytes between markers, which some cameras write, and odd version marks lose no
// pixel. Levels from 0 on trace.
void jpeg_message(j_common_ptr common, int level) {
  const int code = common->err->msg_code;
  if (level < 0 && code != JWRN_EXTRANEOUS_DATA && code != JWRN_JFIF_MAJOR && code != JWRN_ADOBE_XFORM)
    jpeg_fail(common);
}

// A few kilobytes can hold thousands of progressive scans, each of which costs a pass over all pixels.
void jpeg_progress(j_common_ptr common) {
  constexpr int kMaxScans = 100;
  auto* decoder = reinterpret_cast<JpegDecoder*>(common->err);
  if (decoder->jpeg.input_scan_number <= kMaxScans) return;
  std::snprintf(decoder->message, sizeof(decoder->message), "more than %d scans", kMaxScans);
  std::longjmp(decoder->escape, 1);
}

bool jpeg_header(JpegDecoder& d, std::span<const std::uint8_t> file) {
  if (setjmp(d.escape)) return false;
  jpeg_create_decompress(&d.jpeg);
  d.created = true;
  d.jpeg.mem->max_memory_to_use = 512L << 20;
  d.progress.progress_monitor = jpeg_progress;
  d.jpeg.progress = &d.progress;
  jpeg_mem_src(&d.jpeg, file.data(), file.size());
  jpeg_read_header(&d.jpeg, TRUE);
  return true;
}

bool jpeg_pixels(JpegDecoder& d, std::uint8_t* pixels, std::size_t stride) {
  if (setjmp(d.escape)) return false;
  d.jpeg.out_color_space = JCS_RGB;
  jpeg_start_decompress(&d.jpeg);
  while (d.jpeg.output_scanline < d.jpeg.output_height) {
    JSAMPROW row = pixels + stride * d.jpeg.output_scanline;
    jpeg_read_scanlines(&d.jpeg, &row, 1);
  }
  jpeg_finish_decompress(&d.jpeg);
  return true;
}

Status decode_jpeg(std::span<const std::uint8_t> file, Image& image) {
  JpegDecoder d{};
  d.jpeg.err = jpeg_std_error(&d.errors);
  d.errors.error_exit = jpeg_fail;
  d.errors.emit_message = jpeg_message;
  if (!jpeg_header(d, file)) return Status::invalid(std::string("JPEG: ") + d.message);
  if (d.jpeg.num_components > 3) return Status::invalid("JPEG: CMYK colors; convert the image to RGB");
  SF_RETURN_IF_ERROR(prepare(d.jpeg.image_width, d.jpeg.image_height, image));
  if (!jpeg_pixels(d, image.rgb.data(), std::size_t{3} * image.width))
    return Status::invalid(std::string("JPEG: ") + d.message);
  return Status::ok_status();
}

}  // namespace

Status decode_image(std::span<const std::uint8_t> file, Image& image) {
  if (file.size() >= sizeof(kPngSignature) &&
      std::memcmp(file.data(), kPngSignature, sizeof(kPngSignature)) == 0) {
    return decode_png(file, image);
  }
  if (file.size() >= 3 && file[0] == 0xff && file[1] == 0xd8 && file[2] == 0xff)
    return decode_jpeg(file, image);
  return Status::invalid("neither a PNG nor a JPEG file; convert the image to one of them");
}

Result<Image> read_image_file(const std::string& path) {
  SF_ASSIGN_OR_RETURN(const std::vector<std::uint8_t> file, read_binary_file(path, kMaxFileBytes));
  Image image;
  SF_RETURN_IF_ERROR(decode_image(file, image).with_context(path));
  return image;
}

}  // namespace servoflow::stages
