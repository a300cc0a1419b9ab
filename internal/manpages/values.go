package manpages

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// Duration spells a duration as people do: "1m30s", "1h", where Go's String
// has "1h0m0s".
func Duration(d time.Duration) string {
	text := d.String()
	for _, zero := range []string{"m0s", "h0m"} {
		if rest, found := strings.CutSuffix(text, zero); found {
			text = rest + zero[:1]
		}
	}
	return text
}

// Bytes spells a number of bytes as people do: "64 MiB", with the largest unit
// that leaves no fraction, and "0" and "1000" without one.
func Bytes(n int64) string {
	for _, unit := range []struct {
		shift int
		name  string
	}{{30, "GiB"}, {20, "MiB"}, {10, "KiB"}} {
		if n > 0 && n%(1<<unit.shift) == 0 {
			return fmt.Sprintf("%d %s", n>>unit.shift, unit.name)
		}
	}
	return strconv.FormatInt(n, 10)
}
