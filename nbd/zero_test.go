package nbd

import (
	"bytes"
	"math/rand/v2"
	"testing"
)

// checkParts checks parts against the contract of findZeroes.
func checkParts(t *testing.T, data []byte, off int64, parts []readPart) {
	t.Helper()
	if len(parts) > maxReadParts {
		t.Errorf("%d parts, want at most %d", len(parts), maxReadParts)
	}
	at := off
	for i, p := range parts {
		if p.off != at || p.n <= 0 {
			t.Fatalf("part %d is %+v, want it to begin at %d", i, p, at)
		}
		if i > 0 && parts[i-1].zero == p.zero {
			t.Errorf("parts %d and %d are alike", i-1, i)
		}
		piece := data[at-off:][:p.n]
		if p.zero && (p.n < zeroUnit || !bytes.Equal(piece, make([]byte, p.n))) {
			t.Errorf("part %d of %d bytes is not zero, or too short for a hole", i, p.n)
		}
		at += p.n
	}
	if at != off+int64(len(data)) {
		t.Errorf("parts end at %d, want %d", at, off+int64(len(data)))
	}
}

func TestFindZeroes(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 2000 {
		off := int64(r.IntN(3 * zeroUnit))
		data := make([]byte, 1+r.IntN(200*zeroUnit))
		for range r.IntN(200) {
			data[r.IntN(len(data))] = 1
		}
		parts, found := findZeroes(data, off, nil)
		checkParts(t, data, off, parts)
		zero := false
		for _, p := range parts {
			zero = zero || p.zero
		}
		if zero != found {
			t.Errorf("found %t, and the parts say %t", found, zero)
		}
	}
}

func TestFindZeroesExamples(t *testing.T) {
	ones := bytes.Repeat([]byte{1}, zeroUnit)
	zero := make([]byte, zeroUnit)
	tests := []struct {
		name string
		data [][]byte
		off  int64
		want []readPart
	}{
		{"all", [][]byte{zero, zero}, 0, []readPart{{0, 2 * zeroUnit, true}}},
		{"none", [][]byte{ones, ones}, 0, nil},
		{"a unit that is cut in two", [][]byte{zero[:zeroUnit/2], ones}, zeroUnit / 2, nil},
		{"in the middle", [][]byte{ones, zero, ones}, 0, []readPart{{0, zeroUnit, false}, {zeroUnit, zeroUnit, true}, {2 * zeroUnit, zeroUnit, false}}},
		{"short end", [][]byte{zero, zero[:10]}, 0, []readPart{{0, zeroUnit, true}, {zeroUnit, 10, false}}},
	}
	for _, tt := range tests {
		data := bytes.Join(tt.data, nil)
		parts, found := findZeroes(data, tt.off, nil)
		checkParts(t, data, tt.off, parts)
		if found != (tt.want != nil) || found && !equalParts(parts, tt.want) {
			t.Errorf("%s: got %+v, %t, want %+v", tt.name, parts, found, tt.want)
		}
	}
}

func equalParts(a, b []readPart) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i] != b[i] {
			return false
		}
	}
	return true
}

func BenchmarkFindZeroes(b *testing.B) {
	for name, fill := range map[string]byte{"zeroes": 0, "data": 1} {
		b.Run(name, func(b *testing.B) {
			data := bytes.Repeat([]byte{fill}, 2<<20)
			parts := make([]readPart, 0, maxReadParts)
			b.SetBytes(int64(len(data)))
			b.ReportAllocs()
			for b.Loop() {
				parts, _ = findZeroes(data, 0, parts)
			}
		})
	}
}
