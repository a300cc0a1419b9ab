// Package blockdev opens block devices and files for reading, or for reading and writing. It
// returns their size and their sector size, and notices when a device node leads to another
// disk than the one that was opened. It is for Linux only.
//
// # Writing
//
// All I/O of a device that was opened with Options.Write bypasses the page cache (O_DIRECT), so
// a write that has returned without an error was accepted by the device, and one that failed
// has its own error. Parts of blocks are completed with the bytes around them. A file whose
// file system has no O_DIRECT, or whose size is not a multiple of its block, is written
// through the page cache, and each write waits until it is on stable storage.
//
// Flush and the methods with FUA in their name are no stronger than the device. They are a flush
// of the device's write cache, or a write with the FUA bit where the device has that. On a
// XenServer or XCP-ng host a VDI is a /dev/nbdN that is served by tapdisk, which tells the
// kernel of no write cache: a flush does nothing there, and a write that has returned was
// accepted by the storage below tapdisk, which writes with O_DIRECT. Whether it survives a
// loss of power depends on that storage.
package blockdev
