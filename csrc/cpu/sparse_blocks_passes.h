// everything that products with blocks need of one instruction set, as vector.h says
#include "tile_products.h"
#include "sparse_blocks_rows.h"
#include "sparse_blocks_plan.h"
#include "sparse_blocks_add.h"
#include "sparse_blocks_sample.h"

#undef ISA
#undef ISA_TARGET
#undef ISA_BYTES
