// SPDX-License-Identifier: GPL-2.0
/*
 * What the guest's tests need from inside of the kernel; not part of the series.
 * Each of five devices undoes what it did when its file is released:
 *
 * mmu_notify_hold holds an invalidation of the opener's mapping in flight. The
 *	mm serves interval notifiers before plain ones, and this is a plain one:
 *	what is held here has called all interval notifiers, but the page tables
 *	are as they were. write() of struct mmu_notify_hold_range names what to
 *	hold, and of an empty range lets go; read() waits until something is held.
 *
 * mmu_notify_fail lets the deregistration of user MRs fail. write() of struct
 *	mmu_notify_fail_order begins that, or changes how it goes on; read()
 *	returns how many calls have failed so far, a __u32. An MR that the core
 *	has given up for that reason is freed with its device.
 *
 * mmu_notify_warn expects warnings of a task: they are not printed, but counted.
 *	write() of anything begins that for the caller, once; read() returns how
 *	many there were, a __u32.
 *
 * mmu_notify_methods lends a device methods that no software driver has:
 *	query_ucontext, which adds nothing, and reg_user_mr_dmabuf, which fails
 *	with ENODATA. write() of the device's name, padded to IB_DEVICE_NAME_MAX,
 *	begins that, once. The device cannot be removed meanwhile.
 *
 * mmu_notify_device is an RDMA device of the name mmu_notify_test while its file
 *	is open. It has device memory and registers dma-bufs, which no software
 *	driver does, and uses neither. uverbs decides what a device can do when
 *	the device is added, so these methods cannot be lent.
 */

#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <kunit/test.h>
#include <linux/atomic.h>
#include <linux/fs.h>
#include <linux/jump_label.h>
#include <linux/miscdevice.h>
#include <linux/mmu_notifier.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/rcupdate.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/wait.h>
#include <linux/xarray.h>
#include <rdma/ib_verbs.h>

static ssize_t copy_count(char __user *buf, size_t len, u32 count)
{
	if (len != sizeof(count))
		return -EINVAL;
	return copy_to_user(buf, &count, sizeof(count)) ? -EFAULT : len;
}

/* mmu_notify_hold */

struct mmu_notify_hold_range {
	__u64 start;
	__u64 end;
};

struct hold {
	struct mmu_notifier notifier;
	wait_queue_head_t wait;
	/* The mapping is changed only after these are set */
	unsigned long start;
	unsigned long end;
	atomic_t held;
};

static bool hold_concerns(struct hold *hold,
			  const struct mmu_notifier_range *range)
{
	return range->start < READ_ONCE(hold->end) &&
	       READ_ONCE(hold->start) < range->end;
}

static int hold_invalidate_range_start(struct mmu_notifier *notifier,
				       const struct mmu_notifier_range *range)
{
	struct hold *hold = container_of(notifier, struct hold, notifier);

	if (!mmu_notifier_range_blockable(range) || !hold_concerns(hold, range))
		return 0;

	atomic_inc(&hold->held);
	wake_up_all(&hold->wait);
	/* A test that fails is killed, and must not leave a task behind */
	if (wait_event_killable(hold->wait, !hold_concerns(hold, range)))
		pr_info("killed while an invalidation was held\n");
	atomic_dec(&hold->held);
	return 0;
}

static const struct mmu_notifier_ops hold_ops = {
	.invalidate_range_start = hold_invalidate_range_start,
};

static void hold_set(struct hold *hold, unsigned long start, unsigned long end)
{
	WRITE_ONCE(hold->start, start);
	WRITE_ONCE(hold->end, end);
	wake_up_all(&hold->wait);
}

static int hold_open(struct inode *inode, struct file *filp)
{
	struct hold *hold;
	int ret;

	hold = kzalloc_obj(*hold);
	if (!hold)
		return -ENOMEM;

	init_waitqueue_head(&hold->wait);
	hold->notifier.ops = &hold_ops;
	ret = mmu_notifier_register(&hold->notifier, current->mm);
	if (ret) {
		kfree(hold);
		return ret;
	}
	filp->private_data = hold;
	return 0;
}

static int hold_release(struct inode *inode, struct file *filp)
{
	struct hold *hold = filp->private_data;

	hold_set(hold, 0, 0);
	/* Waits for the callbacks */
	mmu_notifier_unregister(&hold->notifier, hold->notifier.mm);
	kfree(hold);
	return 0;
}

static ssize_t hold_write(struct file *filp, const char __user *buf, size_t len,
			  loff_t *pos)
{
	struct mmu_notify_hold_range range;

	if (len != sizeof(range))
		return -EINVAL;
	if (copy_from_user(&range, buf, sizeof(range)))
		return -EFAULT;
	hold_set(filp->private_data, range.start, range.end);
	return len;
}

static ssize_t hold_read(struct file *filp, char __user *buf, size_t len,
			 loff_t *pos)
{
	struct hold *hold = filp->private_data;

	return wait_event_interruptible(hold->wait, atomic_read(&hold->held));
}

static const struct file_operations hold_fops = {
	.owner = THIS_MODULE,
	.open = hold_open,
	.release = hold_release,
	.write = hold_write,
	.read = hold_read,
};

/* mmu_notify_fail */

struct mmu_notify_fail_order {
	char device[IB_DEVICE_NAME_MAX];
	__s32 error;	/* negative */
	__u32 times;	/* that many calls fail, those after that do not */
};

static struct {
	/* Serializes the hooking; the device is NULL if none is hooked */
	struct mutex lock;
	struct ib_device *device;
	unsigned long open;
	/* What the device did, see there */
	int (*dereg_mr)(struct ib_mr *mr, struct ib_udata *udata);
	void (*dealloc_driver)(struct ib_device *device);
	/* The MRs whose last deregistration failed */
	struct xarray mrs;
	struct mmu_notify_fail_order order;
	atomic_t times;
	atomic_t failed;
} fail = {
	.lock = __MUTEX_INITIALIZER(fail.lock),
	.mrs = XARRAY_INIT(fail.mrs, 0),
};

static int fail_dereg_mr(struct ib_mr *mr, struct ib_udata *udata)
{
	unsigned long index = (unsigned long)mr;

	/* The kernel has MRs of its own */
	if (mr->uobject && atomic_dec_if_positive(&fail.times) >= 0) {
		if (xa_err(xa_store(&fail.mrs, index, mr, GFP_KERNEL)))
			return -ENOMEM;
		atomic_inc(&fail.failed);
		return fail.order.error;
	}
	xa_erase(&fail.mrs, index);
	return fail.dereg_mr(mr, udata);
}

static void fail_unhook(void)
{
	lockdep_assert_held(&fail.lock);
	WRITE_ONCE(fail.device->ops.dereg_mr, fail.dereg_mr);
	WRITE_ONCE(fail.device->ops.dealloc_driver, fail.dealloc_driver);
	fail.device = NULL;
	xa_destroy(&fail.mrs);
}

/* Nobody uses the device any more, so whatever is left nobody will free. */
static void fail_dealloc_driver(struct ib_device *device)
{
	unsigned long index;
	struct ib_mr *mr;

	mutex_lock(&fail.lock);
	xa_for_each(&fail.mrs, index, mr) {
		struct ib_pd *pd = mr->pd;

		/* The PD could not be freed either, for it was in use */
		if (!fail.dereg_mr(mr, NULL) && atomic_dec_and_test(&pd->usecnt))
			ib_dealloc_pd(pd);
	}
	fail_unhook();
	mutex_unlock(&fail.lock);

	device->ops.dealloc_driver(device);
}

/* A client is told of each device: a way to find one by its name. */
static int fail_add(struct ib_device *device)
{
	if (strcmp(dev_name(&device->dev), fail.order.device))
		return -EOPNOTSUPP;

	mutex_lock(&fail.lock);
	if (!fail.device && device->ops.dealloc_driver) {
		fail.device = device;
		fail.dereg_mr = device->ops.dereg_mr;
		fail.dealloc_driver = device->ops.dealloc_driver;
		WRITE_ONCE(device->ops.dealloc_driver, fail_dealloc_driver);
		WRITE_ONCE(device->ops.dereg_mr, fail_dereg_mr);
	}
	mutex_unlock(&fail.lock);
	return -EOPNOTSUPP;
}

static struct ib_client fail_client = {
	.name = "mmu_notify_fail",
	.add = fail_add,
};

static int fail_open(struct inode *inode, struct file *filp)
{
	if (test_and_set_bit(0, &fail.open))
		return -EBUSY;
	atomic_set(&fail.times, 0);
	atomic_set(&fail.failed, 0);
	return 0;
}

static int fail_release(struct inode *inode, struct file *filp)
{
	mutex_lock(&fail.lock);
	if (fail.device)
		fail_unhook();
	mutex_unlock(&fail.lock);
	clear_bit(0, &fail.open);
	return 0;
}

static ssize_t fail_write(struct file *filp, const char __user *buf, size_t len,
			  loff_t *pos)
{
	int ret;

	if (len != sizeof(fail.order))
		return -EINVAL;
	if (copy_from_user(&fail.order, buf, sizeof(fail.order)))
		return -EFAULT;
	fail.order.device[sizeof(fail.order.device) - 1] = '\0';

	if (!fail.device) {
		ret = ib_register_client(&fail_client);
		if (ret)
			return ret;
		ib_unregister_client(&fail_client);
		if (!fail.device)
			return -ENODEV;
	}
	atomic_set(&fail.times, fail.order.times);
	return len;
}

static ssize_t fail_read(struct file *filp, char __user *buf, size_t len,
			 loff_t *pos)
{
	return copy_count(buf, len, atomic_read(&fail.failed));
}

static const struct file_operations fail_fops = {
	.owner = THIS_MODULE,
	.open = fail_open,
	.release = fail_release,
	.write = fail_write,
	.read = fail_read,
};

/* mmu_notify_warn */

struct warn {
	struct kunit test;
	struct kunit_suppressed_warning *suppressed;
};

static int warn_open(struct inode *inode, struct file *filp)
{
	struct warn *warn;

	warn = kzalloc_obj(*warn);
	if (!warn)
		return -ENOMEM;
	kunit_init_test(&warn->test, KBUILD_MODNAME, NULL);
	static_branch_inc(&kunit_running);
	filp->private_data = warn;
	return 0;
}

static int warn_release(struct inode *inode, struct file *filp)
{
	struct warn *warn = filp->private_data;

	kunit_end_suppress_warning(&warn->test, warn->suppressed);
	/* Other tasks may look at the list of KUnit */
	synchronize_rcu();
	kunit_cleanup(&warn->test);
	static_branch_dec(&kunit_running);
	kfree(warn);
	return 0;
}

static ssize_t warn_write(struct file *filp, const char __user *buf, size_t len,
			  loff_t *pos)
{
	struct warn *warn = filp->private_data;

	if (warn->suppressed)
		return -EBUSY;
	warn->suppressed = kunit_start_suppress_warning(&warn->test);
	return warn->suppressed ? len : -ENOMEM;
}

static ssize_t warn_read(struct file *filp, char __user *buf, size_t len,
			 loff_t *pos)
{
	struct warn *warn = filp->private_data;

	return copy_count(buf, len,
			  kunit_suppressed_warning_count(warn->suppressed));
}

static const struct file_operations warn_fops = {
	.owner = THIS_MODULE,
	.open = warn_open,
	.release = warn_release,
	.write = warn_write,
	.read = warn_read,
};

/* mmu_notify_methods */

static struct {
	unsigned long open;
	char name[IB_DEVICE_NAME_MAX];
	struct ib_device *device;
} methods;

static int methods_query_ucontext(struct ib_ucontext *context,
				  struct uverbs_attr_bundle *attrs)
{
	return 0;
}

static struct ib_mr *
methods_reg_user_mr_dmabuf(struct ib_pd *pd, u64 offset, u64 length,
			   u64 virt_addr, int fd, int access,
			   struct ib_dmah *dmah,
			   struct uverbs_attr_bundle *attrs)
{
	return ERR_PTR(-ENODATA);
}

/* As fail_add(). */
static int methods_add(struct ib_device *device)
{
	if (!strcmp(dev_name(&device->dev), methods.name) &&
	    !device->ops.query_ucontext && !device->ops.reg_user_mr_dmabuf &&
	    ib_device_try_get(device)) {
		methods.device = device;
		WRITE_ONCE(device->ops.query_ucontext, methods_query_ucontext);
		WRITE_ONCE(device->ops.reg_user_mr_dmabuf,
			   methods_reg_user_mr_dmabuf);
	}
	return -EOPNOTSUPP;
}

static struct ib_client methods_client = {
	.name = "mmu_notify_methods",
	.add = methods_add,
};

static int methods_open(struct inode *inode, struct file *filp)
{
	return test_and_set_bit(0, &methods.open) ? -EBUSY : 0;
}

static int methods_release(struct inode *inode, struct file *filp)
{
	struct ib_device *device = methods.device;

	if (device) {
		WRITE_ONCE(device->ops.query_ucontext, NULL);
		WRITE_ONCE(device->ops.reg_user_mr_dmabuf, NULL);
		methods.device = NULL;
		ib_device_put(device);
	}
	clear_bit(0, &methods.open);
	return 0;
}

static ssize_t methods_write(struct file *filp, const char __user *buf,
			     size_t len, loff_t *pos)
{
	int ret;

	if (methods.device)
		return -EBUSY;
	if (len != sizeof(methods.name))
		return -EINVAL;
	if (copy_from_user(methods.name, buf, sizeof(methods.name)))
		return -EFAULT;
	methods.name[sizeof(methods.name) - 1] = '\0';

	ret = ib_register_client(&methods_client);
	if (ret)
		return ret;
	ib_unregister_client(&methods_client);
	return methods.device ? len : -ENODEV;
}

static const struct file_operations methods_fops = {
	.owner = THIS_MODULE,
	.open = methods_open,
	.release = methods_release,
	.write = methods_write,
};

/* mmu_notify_device */

static int device_query_device(struct ib_device *device,
			       struct ib_device_attr *attr,
			       struct ib_udata *udata)
{
	return 0;
}

/* A port of no protocol, without GIDs and P_Keys. */
static int device_query_port(struct ib_device *device, u32 port,
			     struct ib_port_attr *attr)
{
	return 0;
}

static int device_get_port_immutable(struct ib_device *device, u32 port,
				     struct ib_port_immutable *immutable)
{
	return 0;
}

static int device_alloc_ucontext(struct ib_ucontext *context,
				 struct ib_udata *udata)
{
	return 0;
}

static void device_dealloc_ucontext(struct ib_ucontext *context)
{
}

/*
 * Without this method the release would wait for the files of uverbs, which
 * the same task may have open.
 */
static void device_disassociate_ucontext(struct ib_ucontext *context)
{
}

static int device_alloc_pd(struct ib_pd *pd, struct ib_udata *udata)
{
	return 0;
}

static int device_dealloc_pd(struct ib_pd *pd, struct ib_udata *udata)
{
	return 0;
}

static struct ib_dm *device_alloc_dm(struct ib_device *device,
				     struct ib_ucontext *context,
				     struct ib_dm_alloc_attr *attr,
				     struct uverbs_attr_bundle *attrs)
{
	struct ib_dm *dm;

	dm = kzalloc_obj(*dm);
	return dm ?: ERR_PTR(-ENOMEM);
}

static int device_dealloc_dm(struct ib_dm *dm, struct uverbs_attr_bundle *attrs)
{
	kfree(dm);
	return 0;
}

/* What the core does not set in an MR is zero. */
static struct ib_mr *device_alloc_mr(void)
{
	struct ib_mr *mr;

	mr = kzalloc_obj(*mr);
	return mr ?: ERR_PTR(-ENOMEM);
}

static struct ib_mr *device_reg_dm_mr(struct ib_pd *pd, struct ib_dm *dm,
				      struct ib_dm_mr_attr *attr,
				      struct uverbs_attr_bundle *attrs)
{
	return device_alloc_mr();
}

static struct ib_mr *
device_reg_user_mr_dmabuf(struct ib_pd *pd, u64 offset, u64 length,
			  u64 virt_addr, int fd, int access,
			  struct ib_dmah *dmah,
			  struct uverbs_attr_bundle *attrs)
{
	return device_alloc_mr();
}

static int device_dereg_mr(struct ib_mr *mr, struct ib_udata *udata)
{
	kfree(mr);
	return 0;
}

static const struct ib_device_ops device_ops = {
	.owner = THIS_MODULE,
	.driver_id = RDMA_DRIVER_UNKNOWN,
	.uverbs_abi_ver = 1,
	.query_device = device_query_device,
	.query_port = device_query_port,
	.get_port_immutable = device_get_port_immutable,
	.alloc_ucontext = device_alloc_ucontext,
	.dealloc_ucontext = device_dealloc_ucontext,
	.disassociate_ucontext = device_disassociate_ucontext,
	.alloc_pd = device_alloc_pd,
	.dealloc_pd = device_dealloc_pd,
	.alloc_dm = device_alloc_dm,
	.dealloc_dm = device_dealloc_dm,
	.reg_dm_mr = device_reg_dm_mr,
	.reg_user_mr_dmabuf = device_reg_user_mr_dmabuf,
	.dereg_mr = device_dereg_mr,
	.size_ib_pd = sizeof(struct ib_pd),
	.size_ib_ucontext = sizeof(struct ib_ucontext),
};

static int device_open(struct inode *inode, struct file *filp)
{
	struct ib_device *device;
	int ret;

	device = _ib_alloc_device(sizeof(*device), &init_net);
	if (!device)
		return -ENOMEM;
	device->node_type = RDMA_NODE_UNSPECIFIED;
	device->phys_port_cnt = 1;
	ib_set_device_ops(device, &device_ops);

	/* Fails if there is one of that name */
	ret = ib_register_device(device, KBUILD_MODNAME, NULL);
	if (ret) {
		ib_dealloc_device(device);
		return ret;
	}
	filp->private_data = device;
	return 0;
}

static int device_release(struct inode *inode, struct file *filp)
{
	struct ib_device *device = filp->private_data;

	ib_unregister_device(device);
	ib_dealloc_device(device);
	return 0;
}

static const struct file_operations device_fops = {
	.owner = THIS_MODULE,
	.open = device_open,
	.release = device_release,
};

static struct miscdevice devices[] = {
	{
		.minor = MISC_DYNAMIC_MINOR,
		.name = "mmu_notify_hold",
		.fops = &hold_fops,
	},
	{
		.minor = MISC_DYNAMIC_MINOR,
		.name = "mmu_notify_fail",
		.fops = &fail_fops,
	},
	{
		.minor = MISC_DYNAMIC_MINOR,
		.name = "mmu_notify_warn",
		.fops = &warn_fops,
	},
	{
		.minor = MISC_DYNAMIC_MINOR,
		.name = "mmu_notify_methods",
		.fops = &methods_fops,
	},
	{
		.minor = MISC_DYNAMIC_MINOR,
		.name = "mmu_notify_device",
		.fops = &device_fops,
	},
};

static void deregister_devices(int count)
{
	while (count--)
		misc_deregister(&devices[count]);
}

static int __init mmu_notify_test_init(void)
{
	int i, ret;

	for (i = 0; i < ARRAY_SIZE(devices); i++) {
		ret = misc_register(&devices[i]);
		if (ret) {
			deregister_devices(i);
			return ret;
		}
	}
	return 0;
}
module_init(mmu_notify_test_init);

static void __exit mmu_notify_test_exit(void)
{
	deregister_devices(ARRAY_SIZE(devices));
}
module_exit(mmu_notify_test_exit);

MODULE_DESCRIPTION("Holds invalidations and fails deregistrations for tests");
MODULE_LICENSE("GPL");
