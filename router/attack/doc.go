// Package attack holds the attacks that a gateway has to stand while it serves
// others: by VPC clients, members of a network, strangers on the wire, local users
// and the controller of a network. Each runs for some seconds, at a bounded rate,
// against `ztgate` in network namespaces, and what legitimate traffic loses
// meanwhile is measured. SECURITY.md names the attack that each of its rows is
// tested by.
//
// Its tests need root and have the build tag e2e; the environment variable ZTGATE is
// the path of the program. `make attack` runs them and prints a table. With ROW, a
// regular expression, it runs only the rows that match it, as in
//
//	make attack ROW='stranger/hello'
//
// With MEMORY all processes of the gateway run in a control group that bounds their
// memory, and none may be killed for want of it.
package attack
