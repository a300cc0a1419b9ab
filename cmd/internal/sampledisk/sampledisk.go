package sampledisk

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
)

const (
	sectorSize   = 512
	fatCopies    = 2
	rootEntries  = 512 // as every formatter of FAT16
	entrySize    = 32
	rootSectors  = rootEntries * entrySize / sectorSize
	reserved     = 1 // the boot sector
	media        = 0xF8
	minClusters  = 4085 // fewer, and readers take the volume for FAT12
	maxClusters  = 65524
	maxPerClust  = 64     // 32 KiB, the largest cluster all systems read
	endOfChain   = 0xFFFF // FAT entry of a file's last cluster
	firstCluster = 2      // entries 0 and 1 of the FAT are no clusters
	volumeLabel  = "XAPINBD    "
	volumeID     = 0x4E42444D // fixed: the same input gives the same disk
	fatDate      = (2024-1980)<<9 | 1<<5 | 1
)

// Errors of Write, besides those of its writer.
var (
	ErrSize = errors.New("size not possible for FAT16")
	ErrFull = errors.New("the files do not fit")
	ErrName = errors.New("not an 8.3 name")
)

// File is a file of the root directory. Name is an upper-case 8.3 name.
type File struct {
	Name string
	Data []byte
}

// Write formats the first size bytes of w and stores files there, one after the other. It
// does not write unused clusters, so a sparse image stays sparse. The result depends on the
// arguments alone.
//
// size is rounded down to sectors; about 2.2 MiB to 2 GiB are possible.
func Write(w io.WriterAt, size int64, files []File) error {
	g, err := newGeometry(size)
	if err != nil {
		return err
	}
	fat := make([]byte, g.fatSectors*sectorSize)
	root := make([]byte, rootSectors*sectorSize)
	binary.LittleEndian.PutUint16(fat[0:], 0xFF00|media)
	binary.LittleEndian.PutUint16(fat[2:], endOfChain) // also says: cleanly unmounted
	copy(root, volumeLabel)
	root[11] = 0x08 // attribute: volume label
	putTime(root)

	if len(files) >= rootEntries {
		return fmt.Errorf("%w: %d files, at most %d", ErrFull, len(files), rootEntries-1)
	}
	next, seen := firstCluster, map[string]bool{}
	for i, f := range files {
		name, err := shortName(f.Name)
		if err != nil {
			return err
		}
		if seen[name] {
			return fmt.Errorf("file %s: name used twice", f.Name)
		}
		seen[name] = true
		n := (len(f.Data) + g.clusterSize() - 1) / g.clusterSize()
		if next+n > firstCluster+g.clusters {
			return fmt.Errorf("%w: no room for %s", ErrFull, f.Name)
		}
		putEntry(root[(i+1)*entrySize:], name, next, len(f.Data))
		if n == 0 {
			continue
		}
		if _, err := w.WriteAt(f.Data, g.clusterOffset(next)); err != nil {
			return fmt.Errorf("file %s: %w", f.Name, err)
		}
		chain(fat, next, n)
		next += n
	}
	return writeMetadata(w, g, fat, root)
}

// writeMetadata is called last, so that a failed Write leaves no volume that looks complete.
func writeMetadata(w io.WriterAt, g geometry, fat, root []byte) error {
	for i := range fatCopies {
		if _, err := w.WriteAt(fat, int64(reserved+i*g.fatSectors)*sectorSize); err != nil {
			return fmt.Errorf("FAT %d: %w", i+1, err)
		}
	}
	if _, err := w.WriteAt(root, int64(g.rootSector())*sectorSize); err != nil {
		return fmt.Errorf("root directory: %w", err)
	}
	if _, err := w.WriteAt(g.bootSector(), 0); err != nil {
		return fmt.Errorf("boot sector: %w", err)
	}
	return nil
}

// chain links n clusters from first on; each entry holds its successor.
func chain(fat []byte, first, n int) {
	for c := first; c < first+n-1; c++ {
		binary.LittleEndian.PutUint16(fat[2*c:], uint16(c+1))
	}
	binary.LittleEndian.PutUint16(fat[2*(first+n-1):], endOfChain)
}

func putEntry(e []byte, name string, first, size int) {
	copy(e, name)
	e[11] = 0x20 // attribute: archive, as a file has that was just written
	putTime(e)
	if size > 0 { // an empty file has no cluster
		binary.LittleEndian.PutUint16(e[26:], uint16(first))
	}
	binary.LittleEndian.PutUint32(e[28:], uint32(size))
}

func putTime(e []byte) {
	binary.LittleEndian.PutUint16(e[16:], fatDate) // created
	binary.LittleEndian.PutUint16(e[18:], fatDate) // read
	binary.LittleEndian.PutUint16(e[24:], fatDate) // written
}

// shortName pads an 8.3 name to the 11 characters of a directory entry.
func shortName(name string) (string, error) {
	base, ext, dot := strings.Cut(name, ".")
	if base == "" || len(base) > 8 || len(ext) > 3 || dot && ext == "" {
		return "", fmt.Errorf("%w: %q", ErrName, name)
	}
	for _, c := range base + ext {
		if (c < 'A' || c > 'Z') && (c < '0' || c > '9') && !strings.ContainsRune("_-~!#$%&@", c) {
			return "", fmt.Errorf("%w: %q", ErrName, name)
		}
	}
	return fmt.Sprintf("%-8s%-3s", base, ext), nil
}
