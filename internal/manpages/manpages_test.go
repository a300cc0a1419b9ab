package manpages

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"
)

func TestDuration(t *testing.T) {
	for d, want := range map[time.Duration]string{
		90 * time.Second: "1m30s", time.Minute: "1m", 10 * time.Minute: "10m", time.Hour: "1h", 24 * time.Hour: "24h",
		90 * time.Minute: "1h30m", 1500 * time.Millisecond: "1.5s", 10 * time.Second: "10s", 0: "0s",
		time.Hour + 30*time.Second: "1h0m30s",
	} {
		if got := Duration(d); got != want {
			t.Errorf("%d: got %s, want %s", d, got, want)
		}
	}
}

func TestBytes(t *testing.T) {
	for n, want := range map[int64]string{
		0: "0", 1000: "1000", 64 << 10: "64 KiB", 64 << 20: "64 MiB", 2 << 30: "2 GiB", 3 << 29: "1536 MiB",
	} {
		if got := Bytes(n); got != want {
			t.Errorf("%d: got %s, want %s", n, got, want)
		}
	}
}

// command is a program with a flag of every kind.
func command() *cobra.Command {
	cmd := &cobra.Command{
		Use: "tool", Short: "Do it", Run: func(*cobra.Command, []string) {},
		Long: "It does.\n\n.dot — and \\ and 'it'.\n\nExit codes:\n  0  done\n  1  not\n     done\n\nSignals:\n  SIGTERM, SIGINT  end",
	}
	f := cmd.Flags()
	f.Duration("wait", 90*time.Second, "how `LONG` to wait")
	f.Duration("fixed", time.Second, "fixed (default 1 s)")
	f.Bool("all", false, "everything")
	f.BoolP("on", "o", true, "on")
	f.String("name", "", "a `NAME`")
	f.StringArray("at", nil, "an `ADDR`")
	f.Int("port", 10809, "port")
	return cmd
}

func TestPage(t *testing.T) {
	cmd := command()
	page := Book{
		Root: cmd, Section: "8", See: []string{"other(5)"},
		Edition: Edition{Version: "1.2", Date: time.Date(2024, 2, 3, 23, 0, 0, 0, time.FixedZone("", -3600))},
		More:    func(*cobra.Command) string { return "Files:\n  /a, /b  both" },
	}.page(cmd)
	want := `.TH "TOOL" "8" "2024-02-04" "tool 1.2" "NBD"
.nh
.ad l
.SH NAME
tool \- Do it
.SH SYNOPSIS
\fBtool [flags]\fR
.SH DESCRIPTION
It does.
.PP
\&.dot \[u2014] and \(rs and \(aqit\(aq.
.SH OPTIONS
.TP
\fB\-\-all\fR
everything
.TP
\fB\-\-at\fR \fIADDR\fR
an ADDR
.TP
\fB\-\-fixed\fR \fIduration\fR
fixed (default 1 s)
.TP
\fB\-h\fR, \fB\-\-help\fR
help for tool
.TP
\fB\-\-name\fR \fINAME\fR
a NAME
.TP
\fB\-o\fR, \fB\-\-on\fR
on (default true)
.TP
\fB\-\-port\fR \fIint\fR
port (default 10809)
.TP
\fB\-\-wait\fR \fILONG\fR
how LONG to wait (default 1m30s)
.SH EXIT STATUS
.TP
\fB0\fR
done
.TP
\fB1\fR
not done
.SH FILES
.TP
\fB/a, /b\fR
both
.SH SIGNALS
.TP
\fBSIGTERM, SIGINT\fR
end
.SH SEE ALSO
other(5)
`
	if page != want {
		t.Errorf("got\n%s\nwant\n%s", page, want)
	}
}

// A page has the date that packages carry, and none that is wrong.
func TestCurrentEdition(t *testing.T) {
	file := filepath.Join(t.TempDir(), "VERSION")
	if err := os.WriteFile(file, []byte("1.2\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ name, epoch, dir, want, err string }{
		{"as packages say", "1700000000", "somewhere", "2023-11-14", ""},
		{"not a number", "yesterday", "", "", "want seconds since 1970"},
		{"pages without a date", "", "somewhere", "", "needs SOURCE_DATE_EPOCH"},
		{"a test without a date", "", "", time.Now().UTC().Format("2006"), ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Setenv("SOURCE_DATE_EPOCH", tt.epoch)
			t.Setenv("MAN_DIR", tt.dir)
			got, err := CurrentEdition(file)
			switch {
			case tt.err != "":
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Errorf("got %v, want %s", err, tt.err)
				}
			case err != nil:
				t.Error(err)
			case got.Version != "1.2" || !strings.HasPrefix(got.Date.UTC().Format("2006-01-02"), tt.want):
				t.Errorf("got %+v, want version 1.2 and %s", got, tt.want)
			}
		})
	}
}
