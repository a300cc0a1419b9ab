package sampledisk

import (
	"encoding/binary"
	"fmt"
)

// geometry has the numbers that depend on the size of a volume.
type geometry struct {
	sectors    int // of the volume
	perCluster int // sectors per cluster, a power of two
	clusters   int
	fatSectors int // of one FAT
}

// newGeometry chooses the smallest clusters with which the volume is FAT16. Readers determine
// the kind of a FAT by the number of clusters alone.
func newGeometry(size int64) (geometry, error) {
	if size > maxClusters*maxPerClust*sectorSize {
		return geometry{}, fmt.Errorf("%w: %d bytes", ErrSize, size)
	}
	for perCluster := 1; perCluster <= maxPerClust; perCluster *= 2 {
		g := geometry{sectors: int(size / sectorSize), perCluster: perCluster}
		// The size of the FAT depends on the number of clusters, which the FAT reduces. It
		// may be two sectors too large, which readers accept.
		rest := g.sectors - reserved - rootSectors
		g.fatSectors = ((rest/perCluster+firstCluster)*2 + sectorSize - 1) / sectorSize
		g.clusters = (rest - fatCopies*g.fatSectors) / perCluster
		if g.clusters > maxClusters {
			continue
		}
		if g.clusters < minClusters {
			break
		}
		return g, nil
	}
	return geometry{}, fmt.Errorf("%w: %d bytes", ErrSize, size)
}

func (g geometry) clusterSize() int { return g.perCluster * sectorSize }
func (g geometry) rootSector() int  { return reserved + fatCopies*g.fatSectors }

func (g geometry) clusterOffset(c int) int64 {
	data := g.rootSector() + rootSectors
	return (int64(data) + int64(c-firstCluster)*int64(g.perCluster)) * sectorSize
}

// bootSector returns a boot sector with the BIOS parameter block. Its code only halts; some
// readers recognise a volume only by the jump at the start.
func (g geometry) bootSector() []byte {
	b := make([]byte, sectorSize)
	copy(b, "\xEB\x3C\x90XAPINBD ") // jump over the parameters; formatter's name
	le := binary.LittleEndian
	le.PutUint16(b[11:], sectorSize)
	b[13] = byte(g.perCluster)
	le.PutUint16(b[14:], reserved)
	b[16] = fatCopies
	le.PutUint16(b[17:], rootEntries)
	if g.sectors < 1<<16 {
		le.PutUint16(b[19:], uint16(g.sectors))
	} else {
		le.PutUint32(b[32:], uint32(g.sectors))
	}
	b[21] = media
	le.PutUint16(b[22:], uint16(g.fatSectors))
	le.PutUint16(b[24:], 63)  // sectors per track and
	le.PutUint16(b[26:], 255) // heads: only BIOSes read them
	b[36] = 0x80              // drive number: first hard disk
	b[38] = 0x29              // the three fields below are valid
	le.PutUint32(b[39:], volumeID)
	copy(b[43:], volumeLabel)
	copy(b[54:], "FAT16   ")
	copy(b[62:], "\xF4\xEB\xFD") // hlt; jmp back to it
	le.PutUint16(b[510:], 0xAA55)
	return b
}
