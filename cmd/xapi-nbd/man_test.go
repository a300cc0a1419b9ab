package main

import (
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"xapi-nbd/internal/manpages"
)

// filesHelp is a section of the man pages that the help texts do not have.
const filesHelp = `Files:
  /etc/xapi-nbd.toml  settings, see xapi-nbd.toml(5)
  /etc/xensource/xapi-ssl.pem  private key and certificate chain of the host,
                     which the packaged unit passes with --certfile
  /etc/xensource-inventory  who this host and its control domain are
  /var/xapi/xapi, /var/lib/xcp/xapi  the socket of xapi
  /var/lib/xapi-nbd/VBDs_to_clean_up  the journal: a line with the uuid of each
                     VBD that may exist because of the service
  /var/lib/xapi-nbd/VBD_creates_pending  calls of VBD.create that xapi has not
                     answered
  /var/lib/xapi-nbd/lock  locked by the process that uses the folder
  /var/lib/xapi-nbd/journal.lock  locked while one of these two is changed
  /var/lib/xapi-nbd/gen.*  locked by each process of the service; more than one
                     after an upgrade, until the old one has ended
  /var/lib/xapi-nbd/control  the socket that status, cleanup and upgrade connect
                     to; control.1 and so on are those of old processes
  /var/run/nonpersistent/nbd  what xapi says each /dev/nbdN is bound to
  /usr/lib/systemd/system/xapi-nbd.service  the unit; xapi-nbd.path starts it once
                     there is a certificate, xapi-nbd.socket is for ports below
                     1024 and for starting on demand
  /usr/share/doc/xapi-nbd  OPERATIONS.md, REFERENCE.md, MIGRATING.md, a dashboard and
                     alert rules`

// manual returns the man pages of the program.
func manual(t *testing.T) manpages.Book {
	t.Helper()
	edition, err := manpages.CurrentEdition("../../VERSION")
	if err != nil {
		t.Fatal(err)
	}
	return manpages.Book{
		Root: newRootCommand(), Section: "8", Edition: edition,
		See: []string{"xapi-nbd-firewall(8)", "xapi-nbd.toml(5)", "nbd-tool(1)"},
		More: func(cmd *cobra.Command) string {
			switch cmd.CommandPath() {
			case "xapi-nbd":
				return signalsHelp + "\n\n" + filesHelp
			case "xapi-nbd serve":
				return filesHelp
			}
			return ""
		},
	}
}

// TestManPages: every command has a page that names all its flags and its exit status.
func TestManPages(t *testing.T) {
	dir := manpages.Dir(t.TempDir())
	book := manual(t)
	if err := book.Write(dir); err != nil {
		t.Fatal(err)
	}
	if err := book.Check(dir); err != nil {
		t.Error(err)
	}
	manpages.Lint(t, dir, "xapi-nbd*.8")
}

// manSection returns a section of a page, as text.
func manSection(t *testing.T, page, title string) string {
	t.Helper()
	_, after, found := strings.Cut(page, "\n.SH "+title+"\n")
	if !found {
		t.Fatalf("the page has no section %s", title)
	}
	section, _, _ := strings.Cut(after, "\n.SH ")
	return strings.NewReplacer(`\-`, "-", `\(aq`, "'").Replace(section)
}
