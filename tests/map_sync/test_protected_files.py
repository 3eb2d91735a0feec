# SPDX-License-Identifier: GPL-2.0-or-later
"""Encrypted files and files with verity are never DAX.

What a mapping of persistent memory shows is what the DIMM holds: an encrypted file would be mapped
as ciphertext, and stores would be plain text on the DIMM; the contents of a file with verity would
not be verified. So ext4 makes such files not DAX, whatever option or flag asks for it
(fs/ext4/inode.c, ext4_should_enable_dax), and DAX and the two exclude each other as flags
(EXT4_DAX_MUT_EXCL). XFS has neither.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from typing import Literal

from paprscm.checks import above, containing
from paprscm.errors import CapabilityError, HostError
from paprscm.flush.syscalls import persist
from paprscm.guest.guest import Guest
from paprscm.map_sync.probe import map_sync
from paprscm.map_sync.verdict import Verdict, judge_map_sync
from paprscm.pmem.mounts import dax_mount, mount
from paprscm.testcase import PaprScmTest
from paprscm.vm.backing_files import find_word
from paprscm.vm.dimms import PMEM_ON
from paprscm.vm.machine import Machine

SIZE = 1 << 20
# The name of a feature in sysfs, and the option of the kernel.
FEATURES = {
    "encrypt": ("encryption", "CONFIG_FS_ENCRYPTION"),
    "verity": ("verity", "CONFIG_FS_VERITY"),
}
ISSUE = "linux-ext4-encrypted-file-is-dax"
IDENTIFIER = re.compile(r"identifier ([0-9a-f]{32})$", re.MULTILINE)


class ProtectedFiles(PaprScmTest):
    """
    Base: an ext4 on pmem=on that allows encryption and verity.

    :avocado: disable
    """

    def machine(self, feature: Literal["encrypt", "verity"]) -> Guest:
        """Boot a guest, and enable a feature of the ext4 on its DIMM, which is not mounted.

        Raises:
            CapabilityError: the guest's kernel was built without it.
        """
        guest = self.boot(Machine(nvdimms=(PMEM_ON.holding("ext4"),)))
        self.disk = dax_mount(guest, PMEM_ON.slot, "ext4", "/mnt").device
        shown, option = FEATURES[feature]
        if guest.run(f"[ -e /sys/fs/ext4/features/{shown} ]").status:
            raise CapabilityError(f"the guest's kernel was built without {option}")
        guest.succeed(f"umount /mnt && tune2fs -O {feature} {self.disk.path}")
        return guest

    def mount(self, guest: Guest, options: str) -> None:
        """Mount the file system; the inodes of a former mount are not in memory anymore."""
        guest.succeed("! mountpoint -q /mnt || umount /mnt")
        mount(guest, self.disk, "ext4", "/mnt", options=options)

    def probe(self, guest: Guest, name: str, verdict: Verdict, *, read_only: bool = False) -> None:
        """Try MAP_SYNC on an existing file; a mapping that is not read-only stores into it."""
        report = map_sync(
            guest,
            f"/mnt/{name}",
            truncate=False,
            read_only=read_only,
            prot="r" if read_only else "rw",
        )
        self.measure(name, report.line)
        self.check_map_sync(name, report, verdict, fstype="ext4")

    def token(self) -> str:
        """A word that is nowhere else in the guest."""
        return f"{self.random().getrandbits(256):064x}"

    def write(self, guest: Guest, name: str, token: str) -> None:
        """Make a file of many copies of a word, durable on the DIMM."""
        guest.succeed(f"yes {token} | head -c {SIZE} > /mnt/{name} && sync /mnt/{name}")

    def expect_content(self, guest: Guest, name: str, token: str) -> None:
        """Check that a file has what was written."""
        line = f"{token}\n".encode()
        expected = hashlib.sha256((line * (SIZE // len(line) + 1))[:SIZE]).hexdigest()
        digest = guest.succeed(f"sha256sum < /mnt/{name}").split()[0]
        self.check(f"digest of {name}", digest, expected)


class Encrypted(ProtectedFiles):
    """
    Files in an encrypted folder of ext4 on pmem=on.

    :avocado: tags=map_sync
    """

    def encrypt(self, guest: Guest, folder: str) -> None:
        """Make a new folder encrypted with a new key, which /mnt then has.

        Raises:
            CapabilityError: the guest's kernel lacks a cipher or digest of the policy.
        """
        key = f"{self.random().getrandbits(512):0128x}"
        octal = "".join(f"\\{byte:03o}" for byte in bytes.fromhex(key))
        self.add_key = f"printf '{octal}' | xfs_io -c add_enckey /mnt"
        added = guest.run(self.add_key)
        found = IDENTIFIER.search(added.stdout)
        if found is None:
            # fs/crypto/hkdf.c: without the digest of the key's derivation.
            self.require_crypto(added.stderr, errno.ENOENT)
            raise HostError(f"xfs_io printed {added.stdout!r} and {added.stderr!r}, and no key")
        self.set_policy = f"xfs_io -c 'set_encpolicy -v 2 {found[1]}'"
        made = guest.run(f"mkdir {folder} && {self.set_policy} {folder} && touch {folder}/first")
        # fs/crypto/keysetup.c: without the cipher.
        self.require_crypto(made.stderr, errno.ENOPKG)
        self.expect("status of the new folder, and of a file in it", made.status, 0)

    def require_crypto(self, message: str, number: int) -> None:
        """Require that a message is not that of an errno, which tells of a missing algorithm."""
        if os.strerror(number) in message:
            raise CapabilityError(f"the guest's kernel lacks an algorithm: {message.strip()}")

    def test_files(self) -> None:
        """An encrypted file refuses MAP_SYNC beside a plain one that grants it.

        Its text is not on the DIMM; without the key it cannot be opened, with the key it is whole.
        """
        guest = self.machine("encrypt")
        secret, plain = self.token(), self.token()
        self.mount(guest, "dax=always")
        self.encrypt(guest, "/mnt/dir")
        guest.succeed(f"truncate -s {SIZE} /mnt/dir/secret /mnt/plain")
        report = map_sync(guest, "/mnt/dir/secret", truncate=False)
        self.measure("a new encrypted file", report.line)
        outcome = judge_map_sync(report)
        is_dax = outcome.verdict is Verdict.ACCEPTED
        found = f"a new encrypted file: {outcome.verdict.value}"
        self.known_issue(ISSUE, shows=is_dax, found=found)
        if is_dax:
            return
        self.check_map_sync("dir/secret", report, Verdict.NOT_DAX, fstype="ext4")
        self.probe(guest, "plain", Verdict.ACCEPTED)
        for name, token in (("dir/secret", secret), ("plain", plain)):
            self.write(guest, name, token)
            self.expect_content(guest, name, token)
        file = guest.file(PMEM_ON.slot)
        self.check("copies of the plain text on the DIMM", len(find_word(file, plain)), above(0))
        self.check("copies of the secret on the DIMM", len(find_word(file, secret)), 0)
        self.mount(guest, "dax=always")
        error = guest.fail("cat /mnt/dir/* > /dev/null").stderr
        self.check("a read without the key", error, containing(os.strerror(errno.ENOKEY)))
        guest.succeed(self.add_key)
        self.expect_content(guest, "dir/secret", secret)
        self.probe(guest, "dir/secret", Verdict.NOT_DAX)

    def test_flags(self) -> None:
        """A folder with the DAX flag cannot be encrypted, and an encrypted one cannot have it."""
        guest = self.machine("encrypt")
        self.mount(guest, "dax=inode")
        self.encrypt(guest, "/mnt/encrypted")
        guest.succeed(
            "mkdir /mnt/dax /mnt/empty && chattr +x /mnt/dax /mnt/empty && "
            f"truncate -s {SIZE} /mnt/dax/file /mnt/encrypted/file"
        )
        self.probe(guest, "dax/file", Verdict.ACCEPTED)
        for what, command in (
            ("encrypt a folder with the flag", f"{self.set_policy} /mnt/empty"),
            ("set the flag of an encrypted folder", "chattr +x /mnt/encrypted"),
        ):
            output = guest.run(f"{command} 2>&1").stdout
            self.check(what, output, containing(os.strerror(errno.EOPNOTSUPP)))
        self.probe(guest, "encrypted/file", Verdict.NOT_DAX)


class Verified(ProtectedFiles):
    """
    Files with verity of ext4 on pmem=on.

    :avocado: tags=map_sync
    """

    def test_files(self) -> None:
        """A file with verity refuses MAP_SYNC, and a byte that changed on the DIMM is an error.

        A plain file shows the changed byte: there is nothing that could detect it.
        """
        guest = self.machine("verity")
        verified, plain = self.token(), self.token()
        tokens = {"verified": verified, "plain": plain}
        self.mount(guest, "dax=never")
        for name, token in tokens.items():
            self.write(guest, name, token)
        guest.succeed(f"truncate -s {SIZE} /mnt/other")
        (enabled,) = persist(guest, "/mnt/verified", "verity")
        self.check("FS_IOC_ENABLE_VERITY", str(enabled), "verity: 0")
        self.mount(guest, "dax=always")
        self.probe(guest, "verified", Verdict.NOT_DAX, read_only=True)
        self.probe(guest, "other", Verdict.ACCEPTED)
        for name, token in tokens.items():
            self.expect_content(guest, name, token)
        guest.succeed("umount /mnt")
        path = guest.file(PMEM_ON.slot)
        with path.open("r+b") as file:
            for place in (*find_word(path, verified), *find_word(path, plain)):
                file.seek(place)
                file.write(b"X")
        self.mount(guest, "dax=always")
        self.check("the plain file", guest.succeed("head -c 1 /mnt/plain"), "X")
        with guest.expect_messages(r"FILE CORRUPTED|verity"):
            error = guest.fail("cat /mnt/verified > /dev/null").stderr
        self.check("a read of the verified file", error, containing(os.strerror(errno.EIO)))

    def test_refused(self) -> None:
        """Verity is refused for a file that is DAX, and the file still grants MAP_SYNC."""
        guest = self.machine("verity")
        token = self.token()
        self.mount(guest, "dax=always")
        guest.succeed(f"truncate -s {SIZE} /mnt/file")
        self.probe(guest, "file", Verdict.ACCEPTED)
        self.write(guest, "file", token)
        (refused,) = persist(guest, "/mnt/file", "verity")
        self.check("FS_IOC_ENABLE_VERITY", refused.error, "EINVAL")
        self.expect_content(guest, "file", token)
        self.probe(guest, "file", Verdict.ACCEPTED)
