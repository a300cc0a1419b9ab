package main

import (
	"fmt"
	"os"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// diskOf returns a text that stands for the disk behind a block device, or the part of it,
// whatever its name is: the kernel gives the same name to another disk after a reboot, or when
// disks are attached in another order. It returns "" if the disk has no identity that the kernel
// knows; number is st_rdev.
func diskOf(number uint64) string {
	folder := fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(number), unix.Minor(number))
	read := func(name string) string {
		text, _ := os.ReadFile(folder + "/" + name) // a device has only some of these files
		return strings.TrimSpace(string(text))
	}
	part := ""
	if n := read("partition"); n != "" {
		part, folder = " partition "+n, folder+"/.." // that of the link's target
	}
	if file := read("loop/backing_file"); file != "" {
		disk := fmt.Sprintf("loop device on %s at offset %s", file, read("loop/offset"))
		if st, err := os.Stat(file); err == nil {
			disk += fmt.Sprintf(" inode %d", st.Sys().(*syscall.Stat_t).Ino)
		}
		return disk + part
	}
	for _, name := range []string{"dm/uuid", "md/uuid", "wwid", "device/wwid", "serial", "device/serial"} {
		if id := read(name); id != "" {
			return "disk with " + name + " " + id + part
		}
	}
	// Numbers of disks are not used twice before the next boot.
	if sequence := read("diskseq"); sequence != "" {
		boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
		if err == nil {
			return "disk " + sequence + " since boot " + strings.TrimSpace(string(boot)) + part
		}
	}
	return ""
}
