// Package intent keeps the write-intent log of a mirror: a file that lists the regions in
// which the two ends may differ. After a crash of the mirror or of the host only these regions
// have to be copied again.
//
// # Rules
//
//   - A region is in the file, durably, before the first write to it begins at the primary.
//   - It leaves the file at least 5 s after its last write, and only after flushes of both
//     ends that began after that write had ended and that made the whole region equal. (An end
//     that loses unflushed data has older data than the other one.)
//   - A new file lists all regions, as nothing was copied yet.
//   - A mirror that was completed can not be resumed: its secondary may have newer data.
//
// The log lists the writes that go through the mirror. It does not notice a primary or a
// secondary that was written in another way, between two runs or beside the mirror.
//
// # File
//
// The file has three slots, at 0, 132 and 264 KiB. Each has the whole content: a header of
// 4 KiB and one bit per region, set if the ends may differ.
//
//	offset  length
//	     0      16  "xapi-nbd mirror\n"
//	    16      32  SHA-256 of the rest of the slot, from offset 48 to the end of the bits
//	    48       4  version of the format, 1
//	    52       4  length of the description
//	    56       8  generation
//	    64    4032  description in JSON: size, region, primary, secondary, ended, ended_at
//	  4096          bits, the lowest bit of the first byte for the first region
//
// Numbers are big-endian. The slot with the highest generation counts, of those with a valid
// checksum. Each change writes two slots and syncs the file; the third keeps the content
// before it. So one slot may be damaged at any time, and a write that a power cut has torn
// leaves the content before it. If two slots are damaged it is unknown which changes are lost,
// and all regions count as listed. The end of the mirror is in all three slots. Regions have
// 16 MiB, or on disks above 16 TiB twice as much until there are at most 2^20 regions.
package intent
