// Sizes of memory layouts, shared with Python: model/layout.py defines them, library.py passes them to the compiler.

#pragma once

#include <cstdint>

#if !defined(LOGPROBD_PAGE_SIZE) || !defined(LOGPROBD_COLUMN_BLOCK)
#error "compile with FLAGS of library.py"
#endif

namespace logprobd {

constexpr int64_t kPage = LOGPROBD_PAGE_SIZE;        // S, tokens of a page
constexpr int64_t kColumns = LOGPROBD_COLUMN_BLOCK;  // output columns in a block of W

}  // namespace logprobd
