package copying

import (
	"bytes"
	"encoding/base64"
	"strings"
	"testing"
)

// TestBitmap: the first block is the most significant bit of the first byte.
func TestBitmap(t *testing.T) {
	const size = 20*bitmapBlock + 1
	bits := []byte{0x80, 0x01, 0x08} // blocks 0, 15 and 20, which is incomplete
	text := base64.StdEncoding.EncodeToString(bits)
	for name, file := range map[string]string{"bytes": string(bits), "base64": text, "xe": text + "\n"} {
		c, err := Bitmap([]byte(file), size)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		var got []int64
		for off := int64(0); off < size; {
			answer, err := c.ask(t.Context(), off, size-off)
			if err != nil || len(answer) != 1 {
				t.Fatalf("%s: %v, %v", name, answer, err)
			}
			if c.kindOf(answer[0].Status) == copyData {
				got = append(got, off, int64(answer[0].Length))
			}
			off += int64(answer[0].Length)
		}
		want := []int64{0, bitmapBlock, 15 * bitmapBlock, bitmapBlock, 20 * bitmapBlock, 1}
		if len(got) != len(want) {
			t.Errorf("%s: got %v, want %v", name, got, want)
			continue
		}
		for i := range want {
			if got[i] != want[i] {
				t.Errorf("%s: got %v, want %v", name, got, want)
			}
		}
	}
}

func TestBitmapLengths(t *testing.T) {
	encoded := base64.StdEncoding.EncodeToString
	tests := []struct {
		name string
		file string
		size int64
		want string // in the error
	}{
		{"right", encoded(make([]byte, 3)), 17 * bitmapBlock, ""},
		{"without the bit of the incomplete block", encoded(make([]byte, 2)), 16*bitmapBlock + 1, ""},
		{"short", encoded(make([]byte, 2)), 17 * bitmapBlock, "has 2 bytes, but a disk of 1114112 bytes has one of 3"},
		{"long", encoded(make([]byte, 4)), 17 * bitmapBlock, "has 4 bytes, but"},
		{"short, not encoded", "\x00\x00", 17 * bitmapBlock, "has 2 bytes and is not base64"},
		{"long, not encoded", "\x00\x00\x00\x00", 17 * bitmapBlock, "has 4 bytes and is not base64"},
		{"empty", "", 17 * bitmapBlock, "has 0 bytes"},
		{"no base64", "AA", 9 * bitmapBlock, ""},
		{"of a smaller disk, in base64", encoded(make([]byte, 48)), 8 * 64 * bitmapBlock, "another disk"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Bitmap([]byte(tt.file), tt.size)
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("got error %v, want %q", err, tt.want)
			}
		})
	}
	c, err := Bitmap(bytes.Repeat([]byte{0}, 2), 16*bitmapBlock+1)
	if err != nil {
		t.Fatal(err)
	}
	answer, err := c.ask(t.Context(), 16*bitmapBlock, 1)
	if err != nil || c.kindOf(answer[0].Status) != copyData {
		t.Errorf("a block without a bit: got %v, error %v; want it to be copied", answer, err)
	}
}
