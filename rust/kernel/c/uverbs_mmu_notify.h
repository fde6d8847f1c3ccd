/* SPDX-License-Identifier: GPL-2.0 OR Linux-OpenIB */

#ifndef UVERBS_MMU_NOTIFY_H
#define UVERBS_MMU_NOTIFY_H

#include <linux/err.h>
#include <linux/types.h>

struct file;
struct page;
struct poll_table_struct;

/*
 * The core of MMU notification, uverbs_mmu_notify.rs.
 *
 * A queue is what an MMU notification FD reads from. It is reference counted;
 * each watch owns a reference. It belongs to the address space of the process
 * that created it, and nobody else can add a watch or read.
 *
 * A watch is the record that the mapping under one MR is observed. It is owned
 * by the MR's uobject and sees each change of the mapping that begins after
 * ib_uverbs_mmu_watch_start() has returned. It reports what it has seen once
 * ib_uverbs_mmu_watch_go_live() has been called.
 *
 * Unless noted otherwise the functions are for process context and may sleep.
 */
struct ib_uverbs_mmu_queue;
struct ib_uverbs_mmu_watch;

/*
 * Create a queue for the current address space. The caller owns one reference.
 *
 * Return: the queue, or an ERR_PTR: -ENOMEM; -EINTR if a signal is pending;
 * -EPERM in a kernel thread. mmap_lock must not be held.
 */
struct ib_uverbs_mmu_queue *ib_uverbs_mmu_queue_alloc(void);

/* Take one more reference. Any context. */
void ib_uverbs_mmu_queue_get(struct ib_uverbs_mmu_queue *queue);

/*
 * Close the queue, unless it is, and give up a reference. Readers wake up, the
 * counter is bumped once, and nothing is delivered any more.
 */
void ib_uverbs_mmu_queue_close_put(struct ib_uverbs_mmu_queue *queue);

/*
 * Implement read(): copy out as many records as there are and as fit.
 *
 * Return: the number of bytes, a multiple of the size of a record and less than
 * what fits only if the queue was empty then or the buffer faulted; -EPERM in
 * another address space; -EINVAL if no record fits; -EIO if the queue is
 * closed; -EAGAIN if it is empty and @nonblock; -ERESTARTSYS; -EFAULT; -EINTR
 * if the task is being killed. An error means that nothing was consumed.
 */
ssize_t ib_uverbs_mmu_queue_read(struct ib_uverbs_mmu_queue *queue,
				 char __user *buf, size_t count, bool nonblock);

/* Implement poll(): EPOLLIN | EPOLLRDNORM if not empty, EPOLLERR if closed. */
__poll_t ib_uverbs_mmu_queue_poll(struct ib_uverbs_mmu_queue *queue,
				  struct file *file,
				  struct poll_table_struct *wait);

/* Return the page with the counter, which lives as long as the queue. */
struct page *ib_uverbs_mmu_queue_page(struct ib_uverbs_mmu_queue *queue);

#if IS_ENABLED(CONFIG_INFINIBAND_USER_MMU_NOTIFY)
/*
 * Observe the mapping of @length bytes at @start, an untagged address, in the
 * current address space, on behalf of an MR that is about to be created.
 *
 * Waits until changes that are under way in this address space are over, so
 * that pages that are pinned afterwards are either still mapped or reported.
 *
 * Return: the watch, which the caller has to stop, or an ERR_PTR: -EPERM in
 * another address space than the creator's; -EINVAL if @length is zero or the
 * range wraps around; -EIO if the queue is closed; -ENOMEM. mmap_lock must not
 * be held.
 */
struct ib_uverbs_mmu_watch *
ib_uverbs_mmu_watch_start(struct ib_uverbs_mmu_queue *queue, u64 start,
			  u64 length, u64 cookie);

/*
 * Report from now on, beginning with what was seen since the watch was started.
 * Does not sleep.
 */
void ib_uverbs_mmu_watch_go_live(struct ib_uverbs_mmu_watch *watch);

/*
 * End a watch and free it. May wait for invalidations that are under way in the
 * address space, so no lock that is held around one may be held.
 *
 * Return: how many of its records were delivered, modulo 2^32. None will be
 * any more; one that was waiting is dropped and not counted.
 */
u32 ib_uverbs_mmu_watch_stop(struct ib_uverbs_mmu_watch *watch);
#else
static inline struct ib_uverbs_mmu_watch *
ib_uverbs_mmu_watch_start(struct ib_uverbs_mmu_queue *queue, u64 start,
			  u64 length, u64 cookie)
{
	return ERR_PTR(-EOPNOTSUPP);
}

static inline void
ib_uverbs_mmu_watch_go_live(struct ib_uverbs_mmu_watch *watch)
{
}

static inline u32 ib_uverbs_mmu_watch_stop(struct ib_uverbs_mmu_watch *watch)
{
	return 0;
}
#endif

#endif /* UVERBS_MMU_NOTIFY_H */
