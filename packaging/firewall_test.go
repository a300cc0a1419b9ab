package packaging

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// firewall runs the helper among fakes.
func (f *fakes) firewall(args ...string) result {
	f.t.Helper()
	return runIn(f.t, f.env(), "./xapi-nbd-firewall", args...)
}

// want compares exit code, output and commands of a call of the helper.
func (f *fakes) want(args string, code int, stdout string, log ...string) {
	f.t.Helper()
	r := f.firewall(strings.Fields(args)...)
	if r.code != code || r.stdout != stdout {
		f.t.Errorf("%s: got exit code %d and %q, want %d and %q (stderr: %s)", args, r.code, r.stdout, code, stdout, r.stderr)
	}
	if diff := cmp.Diff(log, f.log()); diff != "" {
		f.t.Errorf("%s changed: want -, got +\n%s", args, diff)
	}
}

const rule10809 = "-p tcp -m conntrack --ctstate NEW -m tcp --dport 10809 -j ACCEPT"

// reject is a host that lets nothing in by itself.
const reject = "-j REJECT --reject-with icmp-host-prohibited\n"

func TestFirewallIptables(t *testing.T) {
	f := newFakes(t, "iptables", "ip6tables=iptables", "service=logged")
	f.learn("iptables/INPUT", "-j xapi-INPUT\n-j RH-Firewall-1-INPUT\n")
	f.learn("iptables/xapi-INPUT", "-j RETURN\n")
	f.learn("iptables/RH-Firewall-1-INPUT", reject)
	f.learn("ip6tables/INPUT", "-j RH-Firewall-1-INPUT\n")
	f.learn("ip6tables/RH-Firewall-1-INPUT", reject)
	f.learn("sysconfig/iptables", "")

	f.want("status", 1, "port 10809: closed (iptables)\n")
	f.want("--dry-run open", 0, "iptables -I xapi-INPUT "+rule10809+"\nservice iptables save\nip6tables -I RH-Firewall-1-INPUT "+rule10809+"\n")
	f.want("open", 0, "",
		"iptables -I xapi-INPUT "+rule10809, "service iptables save", "ip6tables -I RH-Firewall-1-INPUT "+rule10809)
	f.want("status", 0, "port 10809: open (iptables)\n")
	f.want("open", 0, "") // twice is once
	f.want("status 10810", 1, "port 10810: closed (iptables)\n")
	f.want("--dry-run close", 0, "iptables -D xapi-INPUT "+rule10809+"\nservice iptables save\nip6tables -D RH-Firewall-1-INPUT "+rule10809+"\n")
	f.want("close", 0, "",
		"iptables -D xapi-INPUT "+rule10809, "service iptables save", "ip6tables -D RH-Firewall-1-INPUT "+rule10809)
	f.want("close", 0, "")
	f.want("status", 1, "port 10809: closed (iptables)\n")
}

// TestFirewallHalfOpen: a port that is open for IPv4 only counts as closed.
func TestFirewallHalfOpen(t *testing.T) {
	f := newFakes(t, "iptables", "ip6tables=iptables")
	f.learn("iptables/INPUT", rule10809+"\n"+reject)
	f.learn("ip6tables/INPUT", reject)
	f.want("status", 1, "port 10809: closed (iptables)\n")
	f.want("open", 0, "", "ip6tables -I INPUT "+rule10809)
	f.want("status", 0, "port 10809: open (iptables)\n")
}

func TestFirewallWithoutRules(t *testing.T) {
	f := newFakes(t, "iptables")
	f.learn("iptables/INPUT", "")
	f.want("status", 0, "port 10809: open (iptables)\n")
}

// TestFirewallLeavesXapisPort: where xapi has its own chain the helper leaves xapi's port to
// it, and opens other ports.
func TestFirewallLeavesXapisPort(t *testing.T) {
	f := newFakes(t, "iptables")
	f.learn("iptables/INPUT", "-p tcp -m tcp --dport 10809 -j xapi_nbd_input_chain\n"+reject)
	f.learn("iptables/xapi_nbd_input_chain", reject)
	for _, verb := range []string{"open", "close", "status"} {
		r := f.firewall(verb)
		if r.code != 3 || !strings.Contains(r.stdout, "xapi opens and closes it") {
			t.Errorf("%s: got exit code %d and %q, want 3 and the reason", verb, r.code, r.stdout)
		}
	}
	if log := f.log(); log != nil {
		t.Errorf("changed %q, want nothing", log)
	}
	rule := strings.Replace(rule10809, "10809", "10810", 1)
	f.want("open 10810", 0, "", "iptables -I INPUT "+rule)
}

func TestFirewallNftables(t *testing.T) {
	const chains = `table ip filter {
	chain INPUT {
		type filter hook input priority filter; policy accept;
	}
}
table inet filter {
	chain input {
		type filter hook input priority filter; policy drop;
	}
	chain forward {
		type filter hook forward priority filter; policy drop;
	}
}
table ip nat {
	chain input {
		type nat hook input priority srcnat; policy accept;
	}
}
`
	f := newFakes(t, "nft", "iptables")
	f.learn("nft/chains", chains)
	f.learn("nft/inet-filter-input", "ct state established accept # handle 4\ntcp dport 22 accept # handle 5\n")
	const insert = `nft insert rule inet filter input tcp dport 10809 ct state new accept comment "xapi-nbd 10809"`

	f.want("status", 1, "port 10809: closed (nftables)\n")
	f.want("--dry-run open", 0, insert+"\n")
	f.want("open", 0, "", insert)
	f.want("open", 0, "")
	f.want("status", 0, "port 10809: open (nftables)\n")
	f.want("status 1080", 1, "port 1080: closed (nftables)\n")
	f.want("--dry-run close", 0, "nft delete rule inet filter input handle 9\n")
	f.want("close", 0, "", "nft delete rule inet filter input handle 9")
	f.want("close", 0, "")
	f.want("status", 1, "port 10809: closed (nftables)\n")
}

func TestFirewallFirewalld(t *testing.T) {
	f := newFakes(t, "firewall-cmd", "nft", "iptables")
	f.learn("ports/22/tcp", "")
	f.learn("ports/10809/none", "") // makes the folder
	f.want("status", 1, "port 10809: closed (firewalld)\n")
	f.want("--dry-run open", 0, "firewall-cmd -q --add-port=10809/tcp\nfirewall-cmd -q --permanent --add-port=10809/tcp\n")
	f.want("open", 0, "", "firewall-cmd -q --add-port=10809/tcp", "firewall-cmd -q --permanent --add-port=10809/tcp")
	f.want("status", 0, "port 10809: open (firewalld)\n")
	f.want("close", 0, "", "firewall-cmd -q --remove-port=10809/tcp", "firewall-cmd -q --permanent --remove-port=10809/tcp")
	f.want("status", 1, "port 10809: closed (firewalld)\n")
}

// TestFirewallBackend: --backend has priority over the detected backend.
func TestFirewallBackend(t *testing.T) {
	f := newFakes(t, "firewall-cmd", "iptables")
	f.learn("iptables/INPUT", reject)
	f.want("--backend iptables status", 1, "port 10809: closed (iptables)\n")
	f.want("--backend=iptables open", 0, "", "iptables -I INPUT "+rule10809)
}

func TestFirewallUsage(t *testing.T) {
	f := newFakes(t, "iptables")
	f.learn("iptables/INPUT", reject)
	for _, args := range []string{"", "shut", "open 0", "open 65536", "open 1x", "open 10809 2", "--backend", "--backend=pf open", "--force open", "open 100000"} {
		r := f.firewall(strings.Fields(args)...)
		if r.code != 2 || !strings.HasPrefix(r.stderr, "usage: ") {
			t.Errorf("%q: got exit code %d and %q, want 2 and usage", args, r.code, r.stderr)
		}
	}
	if log := f.log(); log != nil {
		t.Errorf("changed %q, want nothing", log)
	}
	none := newFakes(t)
	if r := none.firewall("open"); r.code != 1 || !strings.Contains(r.stderr, "neither") {
		t.Errorf("without any firewall: got exit code %d and %q", r.code, r.stderr)
	}
}
