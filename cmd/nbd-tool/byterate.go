package main

import (
	"fmt"
	"strconv"
	"strings"
)

// minRate is the lowest rate limit in bytes per second: below it even one request would take
// longer than servers wait for the next one.
const minRate = 64 << 10

// byteRate is a number of bytes per second as a flag; 0 is no limit.
type byteRate int64

// String implements pflag.Value.
func (r *byteRate) String() string { return strconv.FormatInt(int64(*r), 10) }

// Type implements pflag.Value.
func (r *byteRate) Type() string { return "bytes" }

// Set implements pflag.Value.
func (r *byteRate) Set(text string) error {
	number, shift := text, 0
	for unit, bits := range map[string]int{"K": 10, "M": 20, "G": 30} {
		for _, suffix := range []string{unit + "iB", unit} {
			if before, found := strings.CutSuffix(text, suffix); found {
				number, shift = before, bits
			}
		}
	}
	v, err := strconv.ParseInt(number, 10, 32)
	if err != nil || v < 0 || v != 0 && v<<shift < minRate {
		return fmt.Errorf("want a number of at least 64K, with K, M or G for KiB, MiB or GiB, or 0")
	}
	*r = byteRate(v << shift)
	return nil
}
