"""A cloud to rehearse in: EC2 as documented, in front of moto, and machines that are sshds on loopback."""
