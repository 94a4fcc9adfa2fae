// The check of a file's codes, and what codes in base 3 expand to on a processor that does not stream them.
#pragma once

#include "linear.h"

namespace bitdistill {

// Whether `linear` holds only values of three codes in base 3, and no code 3 in lines of two bits a code.
bool is_sound(const Linear& linear);

// The lines of two bits a code, (num_panels, num_lines, 64), of `linear`, of base 3.
void expand_base3(const Linear& linear, uint8_t* lines);

}  // namespace bitdistill
