package sampledisk

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
)

// SampleSize is the size of a volume that is large enough for Sample.
const SampleSize = 64 << 20

// Sample returns the demo's files: a README.TXT with the checksums of the others, a text
// whose lines are their own offsets, random data, which cannot be compressed, and an empty
// file. Every call returns the same bytes.
func Sample() []File {
	files := []File{
		{"LINES.TXT", lines(1 << 20)},
		{"RANDOM1.BIN", random(1, 3<<20)},
		{"RANDOM2.BIN", random(2, 8<<20+12345)}, // ends within a cluster
		{"EMPTY.DAT", nil},
	}
	var readme bytes.Buffer
	fmt.Fprint(&readme, "This disk was made for the demo of xapi-nbd.\r\n"+
		"If you can read this through NBD, everything in between works.\r\n\r\nsha256:\r\n")
	for _, f := range files {
		fmt.Fprintf(&readme, "%x  %s\r\n", sha256.Sum256(f.Data), f.Name)
	}
	return append([]File{{"README.TXT", readme.Bytes()}}, files...)
}

// lines returns n bytes of 16-byte lines, each its own offset.
func lines(n int) []byte {
	var b bytes.Buffer
	for off := 0; off < n; off += 16 {
		fmt.Fprintf(&b, "offset %7d\r\n", off)
	}
	return b.Bytes()[:n]
}

func random(seed byte, n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{seed}).Read(b) // never fails
	return b
}
