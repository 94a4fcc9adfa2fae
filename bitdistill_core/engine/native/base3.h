// Files whose codes are in base 3: their check, and what they expand to on a processor that does not stream them.
#pragma once

#include "linear.h"

namespace bitdistill {

// Whether `linear`, of base 3, holds only values of three codes, and no code 3 in the lines beside them.
bool is_sound_base3(const Linear& linear);

// The lines of two bits a code, (num_panels, num_lines, 64), of `linear`, of base 3.
void expand_base3(const Linear& linear, uint8_t* lines);

// Whether a byte of lines holds code 3, which is no ternary weight.
bool has_code_3(const uint8_t* bytes, std::size_t count);

}  // namespace bitdistill
