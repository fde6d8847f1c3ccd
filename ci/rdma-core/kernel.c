// SPDX-License-Identifier: GPL-2.0
/*
 * A library to preload: its ioctl() answers requests of libibverbs as other kernels do.
 * test_traps.py chooses what the next requests get. With KERNEL_IS_OLD in the environment
 * the kernel is old from the beginning.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <rdma/ib_user_ioctl_cmds.h>
#include <rdma/ib_user_ioctl_verbs.h>
#include <rdma/rdma_user_ioctl.h>
#include <rdma/rdma_user_ioctl_cmds.h>

int kernel_reg_error;	/* watched registrations get this errno */
int kernel_destroy_error; /* so do deregistrations */
bool kernel_is_old;	/* knows neither the attributes nor the commands of the series */
size_t kernel_dirty;	/* the next object of this size is not cleared */

__attribute__((constructor)) static void from_environment(void)
{
	kernel_is_old = getenv("KERNEL_IS_OLD");
}

/* Removes an attribute as a kernel does that does not know it. */
static int forget(struct ib_uverbs_ioctl_hdr *hdr, int id)
{
	for (int i = 0; i < hdr->num_attrs; i++) {
		if (hdr->attrs[i].attr_id != id)
			continue;
		if (hdr->attrs[i].flags & UVERBS_ATTR_F_MANDATORY)
			return EPROTONOSUPPORT;
		memmove(&hdr->attrs[i], &hdr->attrs[i + 1],
			(hdr->num_attrs - i - 1) * sizeof(hdr->attrs[0]));
		hdr->num_attrs--;
		hdr->length -= sizeof(hdr->attrs[0]);
	}
	return 0;
}

static bool has(const struct ib_uverbs_ioctl_hdr *hdr, int id)
{
	for (int i = 0; i < hdr->num_attrs; i++)
		if (hdr->attrs[i].attr_id == id)
			return true;
	return false;
}

static int answer(struct ib_uverbs_ioctl_hdr *hdr)
{
	int error = 0;

	if (hdr->object_id == UVERBS_OBJECT_MMU_NOTIFY && kernel_is_old)
		return EPROTONOSUPPORT;
	if (hdr->object_id != UVERBS_OBJECT_MR)
		return 0;
	if (hdr->method_id == UVERBS_METHOD_REG_MR) {
		if (kernel_is_old)
			error = forget(hdr, UVERBS_ATTR_REG_MR_NOTIFY_FD) ?:
				forget(hdr, UVERBS_ATTR_REG_MR_NOTIFY_COOKIE);
		else if (has(hdr, UVERBS_ATTR_REG_MR_NOTIFY_FD))
			error = kernel_reg_error;
	} else if (hdr->method_id == UVERBS_METHOD_MR_DESTROY) {
		error = kernel_destroy_error;
		if (!error && kernel_is_old)
			error = forget(hdr, UVERBS_ATTR_DESTROY_MR_RESP_EVENTS_REPORTED);
	}
	return error;
}

/* An old kernel does not announce the feature to a new context. */
static void hide_support(const struct ib_uverbs_ioctl_hdr *hdr)
{
	int id = hdr->method_id == UVERBS_METHOD_GET_CONTEXT ?
			 UVERBS_ATTR_GET_CONTEXT_CORE_SUPPORT :
			 UVERBS_ATTR_QUERY_CONTEXT_CORE_SUPPORT;

	if (hdr->object_id != UVERBS_OBJECT_DEVICE ||
	    (hdr->method_id != UVERBS_METHOD_GET_CONTEXT &&
	     hdr->method_id != UVERBS_METHOD_QUERY_CONTEXT))
		return;
	for (int i = 0; i < hdr->num_attrs; i++)
		if (hdr->attrs[i].attr_id == id)
			*(uint64_t *)(uintptr_t)hdr->attrs[i].data &=
				~(uint64_t)IB_UVERBS_CORE_SUPPORT_MMU_NOTIFY;
}

int ioctl(int fd, unsigned long request, ...)
{
	static int (*real)(int, unsigned long, ...);
	long copy[512];
	void *argument;
	va_list list;
	int error, result;

	va_start(list, request);
	argument = va_arg(list, void *);
	va_end(list);
	if (!real)
		*(void **)&real = dlsym(RTLD_NEXT, "ioctl");
	error = request == RDMA_VERBS_IOCTL ? answer(argument) : 0;
	if (error == EIO) { /* the device has gone, and all its objects with it */
		memcpy(copy, argument, ((struct ib_uverbs_ioctl_hdr *)argument)->length);
		real(fd, request, copy);
	}
	errno = error;
	if (error)
		return -1;
	result = real(fd, request, argument);
	if (!result && kernel_is_old && request == RDMA_VERBS_IOCTL)
		hide_support(argument);
	return result;
}

extern void *__libc_calloc(size_t count, size_t size);

void *calloc(size_t count, size_t size)
{
	void *memory = __libc_calloc(count, size);

	if (kernel_dirty && memory && count == 1 && size == kernel_dirty) {
		kernel_dirty = 0;
		memset(memory, 0xa5, size);
	}
	return memory;
}
