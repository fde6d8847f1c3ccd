/* SPDX-License-Identifier: GPL-2.0 */
/* The memory of the plug-in: each buffer of a run has a part of its own. */
#define PLUGIN_SIZE ((size_t)8 << 20)
