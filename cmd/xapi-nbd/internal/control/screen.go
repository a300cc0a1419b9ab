package control

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"xapi-nbd/cmd/xapi-nbd/internal/text"
)

// screenWidth is the number of columns that a status may have.
const screenWidth = 80

// Screen returns a status as text of at most 80 columns. last is the status before it, for
// rates of the time in between, or nil: then rates are averages.
func Screen(r, last *StatusReport) string {
	var b strings.Builder
	add := func(format string, args ...any) { addLine(&b, format, args...) }
	if r.State == StateNoAnswer {
		add("xapi-nbd %s: %s", r.Version, r.State)
		addReplaced(&b, r, last)
		return b.String()
	}
	add("xapi-nbd %s: %s for %s, process %d", r.Version, r.State, age(r.Now.Sub(r.Started)), r.PID)
	for _, addr := range r.Listening {
		add("listening on %s", addr)
	}
	addXapi(&b, r)
	add("")
	l := r.Limits
	add("%-22s %d of %d", "connections served", l.Connections, l.MaxConnections)
	add("%-22s %d of %d", "VDIs attached", l.VBDs, l.MaxVBDs)
	// Each connection has memory besides the shared one, so the text is not "x of y".
	add("%-22s %s (%s shared)", "bytes in flight", bytesText(l.InflightBytes), bytesText(l.MaxInflightBytes))
	if l.RateLimit > 0 {
		add("%-22s %s/s", "rate limit", bytesText(l.RateLimit))
	}
	if l.RateLimitVDI > 0 {
		add("%-22s %s/s", "rate limit of a VDI", bytesText(l.RateLimitVDI))
	}
	addRefused(&b, r.Refused)
	if r.LogDropped > 0 {
		add("%-22s %d", "log lines dropped", r.LogDropped)
	}
	addRetries(&b, r)
	addAttachments(&b, r)
	addConnections(&b, r, last)
	addJournal(&b, r)
	addReplaced(&b, r, last)
	return b.String()
}

// addReplaced shows the processes that upgrades have replaced: their attachments and
// connections.
func addReplaced(b *strings.Builder, r, last *StatusReport) {
	for i := range r.Replaced {
		old := &r.Replaced[i]
		addLine(b, "")
		addLine(b, "process %d, version %s, %s", old.PID, old.Version, old.State)
		var before *StatusReport
		if last != nil {
			if n := slices.IndexFunc(last.Replaced, func(l StatusReport) bool { return l.PID == old.PID }); n >= 0 {
				before = &last.Replaced[n]
			}
		}
		addAttachments(b, old)
		addConnections(b, old, before)
	}
}

// addLine adds one line, cut at screenWidth.
func addLine(b *strings.Builder, format string, args ...any) {
	b.WriteString(text.Cut(strings.TrimRight(fmt.Sprintf(format, args...), " "), screenWidth) + "\n")
}

func addXapi(b *strings.Builder, r *StatusReport) {
	x := r.Xapi
	switch {
	case x.Reachable:
		addLine(b, "xapi answers, last %s ago", age(r.Now.Sub(*x.LastAnswer)))
	case x.LastAnswer == nil && x.LastFailed == nil:
		addLine(b, "xapi has not answered yet")
	case x.LastAnswer == nil:
		addLine(b, "xapi has never answered; asked last %s ago", age(r.Now.Sub(*x.LastFailed)))
	default:
		addLine(b, "xapi does NOT answer; the last answer came %s ago", age(r.Now.Sub(*x.LastAnswer)))
	}
	if !x.Reachable && x.LastError != "" {
		addText(b, x.LastError)
	}
}

func addRefused(b *strings.Builder, refused map[string]int64) {
	var parts []string
	for reason, n := range refused {
		if n > 0 {
			parts = append(parts, fmt.Sprintf("%s %d", reason, n))
		}
	}
	if len(parts) == 0 {
		return
	}
	slices.Sort(parts)
	lines := text.Wrap(strings.Join(parts, ", "), screenWidth-23)
	addLine(b, "%-22s %s", "refused since start", lines[0])
	text.Indent(b, 23, lines[1:])
}

// addRetries lists the actions that have failed and are tried again, each with its last error.
func addRetries(b *strings.Builder, r *StatusReport) {
	if len(r.Retries) == 0 {
		return
	}
	addLine(b, "")
	addLine(b, "%-49s %8s %9s %10s", "CANNOT YET, AND TRIES AGAIN", "ATTEMPTS", "FOR", "NEXT IN")
	for _, retry := range r.Retries {
		addLine(b, "%-49s %8d %9s %10s", text.Cut(retry.Action, 49), retry.Attempts, age(r.Now.Sub(retry.Since)), age(retry.Next.Sub(r.Now)))
		addText(b, retry.LastError)
	}
}

func addAttachments(b *strings.Builder, r *StatusReport) {
	if len(r.Attachments) == 0 {
		return
	}
	addLine(b, "")
	addLine(b, "%-36s %10s %-12s %6s %8s", "ATTACHMENTS  VDI, below it the VBD", "SIZE", "STAGE", "USERS", "AGE")
	for _, a := range r.Attachments {
		size := ""
		if a.Size > 0 {
			size = bytesText(a.Size)
		}
		addLine(b, "%-36s %10s %-12s %6d %8s", a.VDI, size, a.Stage, a.Users, age(r.Now.Sub(a.Since)))
		mode := ""
		if a.Mode == "rw" {
			mode = "for writing"
		}
		if line := strings.TrimSpace(a.VBD + " " + mode); line != "" {
			addLine(b, "  %s", line)
		}
		if names := namesText(a); names != "" {
			addText(b, names)
		}
		switch {
		case a.Blocks.Known:
			addLine(b, "  %s in blocks with data", bytesText(a.Blocks.Data))
		case a.Blocks.Reason != "":
			addLine(b, "  all blocks count as data: %s", a.Blocks.Reason)
		}
	}
}

// namesText returns the name of a VDI and that of its VM in quotation marks, which escape
// control characters: any user who may name a disk chooses the text.
func namesText(a AttachmentReport) string {
	text := ""
	if a.VDIName != "" {
		text = strconv.Quote(a.VDIName)
	}
	if a.VMName != "" {
		text = strings.TrimSpace(text + " of VM " + strconv.Quote(a.VMName))
	}
	return text
}

func addConnections(b *strings.Builder, r, last *StatusReport) {
	if len(r.Connections) == 0 {
		return
	}
	addLine(b, "")
	const columns = "%-9s %-11s %-3s %10s %12s %4s %6s %8s %7s"
	addLine(b, columns, "CONN", "STATE", "TLS", "BYTES", "RATE", "DONE", "LEFT", "INFLIGHT", "AGE")
	for _, c := range r.Connections {
		done, left := "", ""
		if c.VDI != "" {
			done = strconv.Itoa(c.Percent) + "%"
		}
		if c.SecondsLeft != nil {
			left = leftText(time.Duration(*c.SecondsLeft) * time.Second)
		}
		addLine(b, columns, c.ID, c.State, cmp.Or(strings.TrimPrefix(c.TLS, "TLS "), "no"), bytesText(c.Bytes),
			bytesText(rateOf(c, r, last))+"/s", cmp.Or(done, "-"), cmp.Or(left, "-"), strconv.Itoa(c.InFlight), age(r.Now.Sub(c.Since)))
		who := "from " + c.Peer
		if c.VDI != "" {
			who = c.VDI + " " + who
		}
		addText(b, who)
		if c.LastError != "" {
			addText(b, "last error: "+c.LastError)
		}
	}
}

// rateOf returns the rate of a connection since the last status, or its average if the
// last status does not have it.
func rateOf(c ConnectionReport, r, last *StatusReport) int64 {
	if last == nil {
		return c.Rate
	}
	for _, before := range last.Connections {
		if before.ID == c.ID && before.Since.Equal(c.Since) {
			return PerSecond(c.Bytes-before.Bytes, r.Now.Sub(last.Now))
		}
	}
	return c.Rate
}

// addJournal lists the VBDs of the journal that are not in use.
func addJournal(b *strings.Builder, r *StatusReport) {
	left := slices.DeleteFunc(slices.Clone(r.Journal), func(uuid string) bool {
		return slices.ContainsFunc(r.Attachments, func(a AttachmentReport) bool { return a.VBD == uuid })
	})
	if len(left) == 0 && r.JournalErr == "" {
		return
	}
	addLine(b, "")
	if r.JournalErr != "" {
		addLine(b, "The journal cannot be read: %s", r.JournalErr)
		return
	}
	addLine(b, "VBDs left behind, which the service goes on trying to remove:")
	for _, uuid := range left {
		addLine(b, "  %s", uuid)
	}
}

// maxTextLines bounds the lines of one error on the screen.
const maxTextLines = 3

// addText adds a text that may take up to maxTextLines lines.
func addText(b *strings.Builder, s string) {
	const columns = screenWidth - 2
	lines := text.Wrap(s, columns)
	if len(lines) > maxTextLines {
		lines = lines[:maxTextLines]
		lines[maxTextLines-1] = text.Cut(lines[maxTextLines-1], columns-2) + " …"
	}
	for i := range lines {
		lines[i] = text.Cut(lines[i], columns)
	}
	text.Indent(b, 2, lines)
}

// bytesText returns a number of bytes with a unit, at most 10 columns wide.
func bytesText(n int64) string {
	units := []string{"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"}
	v, i := float64(n), 0
	for v >= 1023.95 && i < len(units)-1 {
		v /= 1024
		i++
	}
	if i == 0 {
		return fmt.Sprintf("%d B", n)
	}
	return fmt.Sprintf("%.1f %s", v, units[i])
}

// leftText returns a time left, at most 6 columns wide.
func leftText(d time.Duration) string {
	if d >= 100*24*time.Hour {
		return ">99d"
	}
	return age(d)
}

// age returns a time span, at most 8 columns wide for 27 years.
func age(d time.Duration) string {
	s := int64(max(d, 0) / time.Second)
	switch {
	case s < 60:
		return fmt.Sprintf("%ds", s)
	case s < 3600:
		return fmt.Sprintf("%dm%02ds", s/60, s%60)
	case s < 86400:
		return fmt.Sprintf("%dh%02dm", s/3600, s/60%60)
	}
	return fmt.Sprintf("%dd%02dh", s/86400, s/3600%24)
}
