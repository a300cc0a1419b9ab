// Package sampledisk writes a disk with a real file system for the demo: a FAT16
// volume without a partition table, readable by every kernel and by mtools.
//
// It is part of this project because formatting FAT16 takes about 150 lines, and the
// maintained libraries would add ten modules (compression, ISO 9660, qcow2) to the binary of
// a service that runs as root.
//
// Layout, as Microsoft's "FAT: General Overview of On-Disk Format" gives it:
// boot sector, two equal FATs, root directory, clusters. Not supported: long
// names, subdirectories, sectors other than 512 bytes, FAT12 and FAT32.
package sampledisk
