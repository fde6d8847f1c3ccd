/* SPDX-License-Identifier: GPL-2.0 OR Linux-OpenIB */

#ifndef UVERBS_MMU_NOTIFY_H
#define UVERBS_MMU_NOTIFY_H

#include <linux/err.h>
#include <linux/types.h>

struct file;
struct iov_iter;
struct page;
struct poll_table_struct;

/*
 * The core of MMU notification, uverbs_mmu_notify.rs, which describes how the
 * parts work together.
 *
 * A queue collects events and backs one notification FD. It is reference
 * counted, and each watch owns a reference. It belongs to the address space in
 * which it was created: no other can be watched, or can read.
 *
 * A watch observes the mapping of one MR, whose uobject owns it. It sees each
 * change of the mapping that begins after ib_uverbs_mmu_watch_start() has
 * returned, and queues events once ib_uverbs_mmu_watch_go_live() was called.
 *
 * Unless noted otherwise the functions are for process context and may sleep.
 */
struct ib_uverbs_mmu_queue;
struct ib_uverbs_mmu_watch;

/*
 * Create a queue for the current address space. The caller owns one reference.
 * mmap_lock must not be held.
 *
 * Return: the queue, or an ERR_PTR: -ENOMEM; -EINTR if a signal is pending;
 * -EPERM in a kernel thread.
 */
struct ib_uverbs_mmu_queue *ib_uverbs_mmu_queue_alloc(void);

/* Take one more reference. Any context. */
void ib_uverbs_mmu_queue_get(struct ib_uverbs_mmu_queue *queue);

/*
 * Close the queue and put a reference. Closing it wakes readers, advances the
 * generation a last time, and ends delivery. Idempotent.
 */
void ib_uverbs_mmu_queue_close_put(struct ib_uverbs_mmu_queue *queue);

/*
 * Close the queue, free its page, and put a reference. For the release of the
 * file, after which there is no mapping.
 */
void ib_uverbs_mmu_queue_release_put(struct ib_uverbs_mmu_queue *queue);

/*
 * Implement read_iter(): copy events to @to.
 *
 * Return: the number of bytes, whole events and at least one. It does not tell
 * whether more events are pending. Or an error, which means that no event was
 * removed: -EPERM in another address space; -EINVAL if no event fits; -EIO if
 * the queue is closed; -EAGAIN if no event is pending and @nonblock;
 * -ERESTARTSYS if a signal ended the wait for an event; -EFAULT; -EINTR if the
 * task is being killed.
 */
ssize_t ib_uverbs_mmu_queue_read(struct ib_uverbs_mmu_queue *queue,
				 struct iov_iter *to, bool nonblock);

/*
 * Implement poll(): EPOLLIN | EPOLLRDNORM if an event is pending, EPOLLERR if
 * the queue is closed. @file must be a stream.
 */
__poll_t ib_uverbs_mmu_queue_poll(struct ib_uverbs_mmu_queue *queue,
				  struct file *file,
				  struct poll_table_struct *wait);

/*
 * Return the page with the generation, which stays until the file is released,
 * and NULL after that.
 */
struct page *ib_uverbs_mmu_queue_page(struct ib_uverbs_mmu_queue *queue);

#if IS_ENABLED(CONFIG_INFINIBAND_USER_MMU_NOTIFY)
/*
 * Observe the mapping of @length bytes at @start, an untagged address, in the
 * current address space, for an MR that is about to be created.
 *
 * Waits, uninterruptibly, for all invalidations that are running in this
 * address space, so that pages pinned afterwards either stay mapped or are
 * reported. mmap_lock must not be held.
 *
 * Return: the watch, which the caller has to stop, or an ERR_PTR: -EPERM in
 * another address space than the creator's; -EINVAL if @length is zero or the
 * range wraps around; -EIO if the queue is closed; -ENOMEM.
 */
struct ib_uverbs_mmu_watch *
ib_uverbs_mmu_watch_start(struct ib_uverbs_mmu_queue *queue, u64 start,
			  u64 length, u64 cookie);

/*
 * Queue events from now on, first of all for what was seen since the watch was
 * started. Does not sleep.
 */
void ib_uverbs_mmu_watch_go_live(struct ib_uverbs_mmu_watch *watch);

/*
 * Stop a watch and free it. A pending event is dropped and not counted.
 *
 * Waits, uninterruptibly, for all invalidations that are running in the address
 * space. No lock may be held that is held around an invalidation.
 *
 * Return: how many of its events were delivered, modulo 2^32. None is delivered
 * after the return.
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
