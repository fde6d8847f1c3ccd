#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""test_traps.py DEVICE: what libibverbs must not do if a kernel or a provider is not as
usual. Needs kernel.c to be preloaded and the patched pyverbs in PYTHONPATH."""

import ctypes
import errno
import mmap
import os
import sys
import unittest

os.environ["RDMAV_ALLOW_DISASSOC_DESTROY"] = "1"  # EIO counts as success

from pyverbs.device import Context
from pyverbs.libibverbs_enums import ibv_access_flags
from pyverbs.mmu_notify import MMUNotifyChannel
from pyverbs.mr import MR, MREx
from pyverbs.pd import PD
from pyverbs.pyverbs_error import PyverbsRDMAError

PAGE = mmap.PAGESIZE
ACCESS = ibv_access_flags.IBV_ACCESS_LOCAL_WRITE
VERBS_MR = 64  # sizeof(struct verbs_mr), which rxe and siw clear
DEVICE = sys.argv.pop()
libc = ctypes.CDLL(None, use_errno=True)


def setting(name, kind=ctypes.c_int):
    return kind.in_dll(libc, "kernel_" + name)


class Traps(unittest.TestCase):
    def setUp(self):
        self.context = Context(name=DEVICE)
        self.pd = PD(self.context)
        self.channel = MMUNotifyChannel(self.context)
        self.buffer = mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.buffer[0] = 1
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.buffer))

    def tearDown(self):
        for name in ("reg_error", "destroy_error"):
            setting(name).value = 0
        setting("is_old", ctypes.c_bool).value = False
        setting("dirty", ctypes.c_size_t).value = 0
        self.context.close()

    def watched(self):
        return MREx(self.pd, PAGE, ACCESS, address=self.address,
                    notify_channel=self.channel, cookie=7)

    def change(self):
        self.buffer.madvise(mmap.MADV_DONTNEED)
        self.assertEqual([e.cookie for e in self.channel.get_events()], [7])

    def refused(self, code):
        """A watched MR cannot be had, and that has no effect on later ones."""
        with self.assertRaises(PyverbsRDMAError) as failed:
            self.watched()
        self.assertEqual(failed.exception.error_code, code)

    def works(self):
        """By ioctl(): the write command of deregistration returns no count."""
        MREx(self.pd, PAGE, ACCESS).close()
        MR(self.pd, PAGE, ACCESS).close()
        mr = self.watched()
        self.change()
        self.assertEqual(mr.dereg_ex(), 1)

    def test_refusal_is_not_remembered(self):
        for code in (errno.EPROTONOSUPPORT, errno.ENOTTY):
            setting("reg_error").value = code
            self.refused(errno.EOPNOTSUPP)
            setting("reg_error").value = 0
            self.works()

    def test_errors_are_passed_on(self):
        for code in (errno.ENOMEM, errno.EINVAL, errno.EPERM):
            setting("reg_error").value = code
            self.refused(code)
        setting("reg_error").value = 0
        self.works()

    def test_old_kernel(self):
        """An old kernel ignores what is not mandatory: no MR without a watch, and MRs
        can be deregistered."""
        plain = MREx(self.pd, PAGE, ACCESS)
        setting("is_old", ctypes.c_bool).value = True
        self.refused(errno.EOPNOTSUPP)
        self.assertIsNone(plain.dereg_ex())
        setting("is_old", ctypes.c_bool).value = False
        self.works()

    def test_old_kernel_announces_nothing(self):
        setting("is_old", ctypes.c_bool).value = True
        with Context(name=DEVICE) as context:
            with self.assertRaises(PyverbsRDMAError) as failed:
                MMUNotifyChannel(context)
        self.assertEqual(failed.exception.error_code, errno.EOPNOTSUPP)

    def test_no_count_without_answer(self):
        """With EIO, as of a device that is gone, there is none, even if it is success."""
        mr = self.watched()
        self.change()
        setting("destroy_error").value = errno.EIO
        self.assertIsNone(mr.dereg_ex())

    def test_failed_deregistration(self):
        mr = self.watched()
        self.change()
        setting("destroy_error").value = errno.EBUSY
        with self.assertRaises(PyverbsRDMAError):
            mr.dereg_ex()
        setting("destroy_error").value = 0
        self.assertEqual(mr.dereg_ex(), 1)

    def test_provider_does_not_clear(self):
        """Most providers do not clear a new MR."""
        dirty = setting("dirty", ctypes.c_size_t)
        for close in (lambda: MR(self.pd, PAGE, ACCESS).close(),
                      lambda: MREx(self.pd, PAGE, ACCESS).close(),
                      lambda: self.watched().close(),
                      lambda: self.assertEqual(self.watched().dereg_ex(), 0)):
            dirty.value = VERBS_MR
            close()
            self.assertEqual(dirty.value, 0, "no object of the size that an MR should have")


if __name__ == "__main__":
    unittest.main()
