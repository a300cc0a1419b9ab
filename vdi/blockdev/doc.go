// Package blockdev opens block devices and files for reading. It returns their size and
// their sector size, and notices when a device node leads to another disk than the one
// that was opened. It is for Linux only.
package blockdev
