// SPDX-License-Identifier: GPL-2.0
/* A plug-in with a large buffer in .bss, for dlopen(). */
#include <stddef.h>

#include "plugin.h"

__attribute__((aligned(4096))) unsigned char plugin_buffer[PLUGIN_SIZE];
