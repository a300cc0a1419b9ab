// Package interop holds what software in OCaml makes of ours, as the original
// service was written in OCaml:
//
//   - a client made of libnbd's bindings, against our server;
//   - a xapi made with XmlRpc-Light, against our client of it;
//   - the original's library, both ways, where it is installed;
//   - the original's dialogues, typed from the protocol's meaning, played against
//     our server and our client.
//
// The programs in the *.ml files are built from Debian's packages by the tests. A
// subtest is named peer/mode/what, and logs the peer's version in a line "peer: …".
package interop
