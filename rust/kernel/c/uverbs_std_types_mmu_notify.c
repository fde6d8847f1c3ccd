// SPDX-License-Identifier: GPL-2.0 OR Linux-OpenIB

#include <rdma/uverbs_std_types.h>
#include <rdma/uverbs_ioctl.h>
#include "rdma_core.h"
#include "uverbs.h"

#define CREATE_TRACE_POINTS
#define CREATE_RUST_TRACE_POINTS
#include <trace/events/ib_uverbs_mmu_notify.h>

static struct ib_uverbs_mmu_notify_file *
to_mmu_notify_file(struct ib_uobject *uobj)
{
	return container_of(uobj, struct ib_uverbs_mmu_notify_file, uobj);
}

/* Set up the queue and the file of a new uobject. */
int uverbs_mmu_notify_init_uobj(struct ib_uobject *uobj)
{
	struct ib_uverbs_mmu_queue *queue;
	struct file *filp = uobj->object;

	queue = ib_uverbs_mmu_queue_alloc();
	if (IS_ERR(queue)) {
		int ret = PTR_ERR(queue);

		/* From mm_take_all_locks(). The call can be restarted. */
		return ret == -EINTR ? -ERESTARTSYS : ret;
	}

	stream_open(NULL, filp);
	filp->f_mode |= FMODE_NOWAIT;

	/* One reference each for destroy_object and release_cleanup */
	ib_uverbs_mmu_queue_get(queue);
	to_mmu_notify_file(uobj)->queue = queue;
	return 0;
}

static int UVERBS_HANDLER(UVERBS_METHOD_MMU_NOTIFY_ALLOC)(
	struct uverbs_attr_bundle *attrs)
{
	struct ib_uobject *uobj =
		uverbs_attr_get_uobject(attrs,
					UVERBS_ATTR_MMU_NOTIFY_ALLOC_FD_HANDLE);
	int ret;

	ret = uverbs_mmu_notify_init_uobj(uobj);
	if (ret)
		return ret;

	uverbs_finalize_uobj_create(attrs,
				    UVERBS_ATTR_MMU_NOTIFY_ALLOC_FD_HANDLE);
	return 0;
}

static void uverbs_mmu_notify_destroy_uobj(struct ib_uobject *uobj,
					   enum rdma_remove_reason why)
{
	struct ib_uverbs_mmu_notify_file *file = to_mmu_notify_file(uobj);

	ib_uverbs_mmu_queue_close_put(file->queue);
	/* There is no release_cleanup for a file that was never installed */
	if (why == RDMA_REMOVE_ABORT)
		ib_uverbs_mmu_queue_release_put(file->queue);
}

static void uverbs_mmu_notify_release_cleanup(struct ib_uobject *uobj)
{
	ib_uverbs_mmu_queue_release_put(to_mmu_notify_file(uobj)->queue);
}

static ssize_t uverbs_mmu_notify_read_iter(struct kiocb *iocb,
					   struct iov_iter *to)
{
	struct file *filp = iocb->ki_filp;
	struct ib_uverbs_mmu_notify_file *file = filp->private_data;
	bool nonblock = (filp->f_flags & O_NONBLOCK) ||
			(iocb->ki_flags & IOCB_NOWAIT);

	return ib_uverbs_mmu_queue_read(file->queue, to, nonblock);
}

static __poll_t uverbs_mmu_notify_poll(struct file *filp,
				       struct poll_table_struct *wait)
{
	struct ib_uverbs_mmu_notify_file *file = filp->private_data;

	return ib_uverbs_mmu_queue_poll(file->queue, filp, wait);
}

static vm_fault_t uverbs_mmu_notify_fault(struct vm_fault *vmf)
{
	vmf->page = vmf->vma->vm_private_data;
	get_page(vmf->page);
	return 0;
}

static const struct vm_operations_struct uverbs_mmu_notify_vm_ops = {
	.fault = uverbs_mmu_notify_fault,
};

static int uverbs_mmu_notify_mmap_prepare(struct vm_area_desc *desc)
{
	struct ib_uverbs_mmu_notify_file *file = desc->file->private_data;

	/*
	 * The file is read-only, so for a shared mapping mmap() has refused
	 * PROT_WRITE and cleared VMA_SHARED and VMA_MAYWRITE. Only VMA_MAYSHARE
	 * tells a shared mapping from a private one.
	 */
	if (desc->pgoff || vma_desc_size(desc) != PAGE_SIZE ||
	    !vma_desc_test(desc, VMA_MAYSHARE_BIT))
		return -EINVAL;

	vma_desc_set_flags(desc, VMA_DONTCOPY_BIT, VMA_DONTEXPAND_BIT,
			   VMA_DONTDUMP_BIT);
	/* Map on fault, so that the page comes back after MADV_DONTNEED */
	desc->vm_ops = &uverbs_mmu_notify_vm_ops;
	/* Freed on release of the file, which the mapping keeps open */
	desc->private_data = ib_uverbs_mmu_queue_page(file->queue);
	return 0;
}

static const struct file_operations uverbs_mmu_notify_fops = {
	.owner	      = THIS_MODULE,
	.read_iter    = uverbs_mmu_notify_read_iter,
	.poll	      = uverbs_mmu_notify_poll,
	.mmap_prepare = uverbs_mmu_notify_mmap_prepare,
	.release      = uverbs_uobject_fd_release,
};

DECLARE_UVERBS_NAMED_METHOD(
	UVERBS_METHOD_MMU_NOTIFY_ALLOC,
	UVERBS_ATTR_FD(UVERBS_ATTR_MMU_NOTIFY_ALLOC_FD_HANDLE,
		       UVERBS_OBJECT_MMU_NOTIFY,
		       UVERBS_ACCESS_NEW,
		       UA_MANDATORY));

DECLARE_UVERBS_NAMED_OBJECT(
	UVERBS_OBJECT_MMU_NOTIFY,
	UVERBS_TYPE_ALLOC_FD_RELEASE(sizeof(struct ib_uverbs_mmu_notify_file),
				     uverbs_mmu_notify_destroy_uobj,
				     uverbs_mmu_notify_release_cleanup,
				     &uverbs_mmu_notify_fops,
				     "[infinibandmmunotify]",
				     O_RDONLY),
	&UVERBS_METHOD(UVERBS_METHOD_MMU_NOTIFY_ALLOC));

const struct uapi_definition uverbs_def_obj_mmu_notify[] = {
	UAPI_DEF_CHAIN_OBJ_TREE_NAMED(UVERBS_OBJECT_MMU_NOTIFY),
	{}
};
